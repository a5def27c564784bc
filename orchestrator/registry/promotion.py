"""Decisions about aliases, as pure functions: what keeps a prompt from replacing another, which of two is better."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any, Literal

from orchestrator.artifact import Manifest
from orchestrator.spec import TEXT_METRICS

HISTORY_TAG = "orchestrator.alias_history"
HISTORY_LENGTH = 100

Better = Literal["max", "min"]
Move = dict[str, Any]  # alias, from, to, at, reason


def differences(new: Manifest, holder: Manifest) -> list[str]:
    """What makes the new prompt unfit for the backbone that serves the holder; empty when it fits."""
    mine, other = _fit(new), _fit(holder)
    found = [f"{what} is {mine[what]:.16}, not {other[what]:.16}" for what in mine if mine[what] != other[what]]
    if found and new.base_model.id != holder.base_model.id:
        found.insert(0, f"base model is {new.base_model.id}, not {holder.base_model.id}")
    return found


def _fit(manifest: Manifest) -> dict[str, str]:
    base = manifest.base_model
    return {
        "base model fingerprint": base.fingerprint,
        "tokenizer digest": base.tokenizer_digest,
        "hidden size": str(base.hidden_size),
    }


def verdict(new: Manifest, champion: Manifest, metric: str, better: Better) -> tuple[bool, str]:
    """Whether the new prompt beats the champion on the same test split, and the reason as a clause."""
    if found := differences(new, champion):
        return False, f"its {found[0]}"
    if new.data.fingerprint != champion.data.fingerprint:
        return False, "the champion was tested on other data"
    if metric in TEXT_METRICS and new.generation != champion.generation:
        return False, "the champion's texts were generated with other settings"
    mine, other = (manifest.metrics.get("test", {}).get(metric) for manifest in (new, champion))
    if mine is None or other is None:
        return False, f"{'it' if mine is None else 'the champion'} has no test {metric}"
    won = mine > other if better == "max" else mine < other
    return won, f"its test {metric} is {mine:.4g}, the champion's {other:.4g}"


def read_history(text: str | None) -> list[Move]:
    """The moves on record, oldest first; a record that somebody damaged counts as empty."""
    try:
        moves = json.loads(text or "[]")
    except json.JSONDecodeError:
        return []
    return [move for move in moves if isinstance(move, dict)] if isinstance(moves, list) else []


def with_move(moves: list[Move], alias: str, old: int | None, new: int, reason: str) -> str:
    """The record with one more move, as the tag's text; the oldest fall off."""
    at = datetime.now(UTC).isoformat(timespec="seconds")
    move = {"alias": alias, "from": old, "to": new, "at": at, "reason": reason}
    return json.dumps([*moves, move][-HISTORY_LENGTH:])


def previous_holder(moves: list[Move], alias: str, current: int) -> int | None:
    """Whom a rollback puts back. Rolling back twice goes back two moves: an undone move is no longer history."""
    holders: list[int] = []
    for move in moves:
        if move.get("alias") != alias or not isinstance(move.get("to"), int):
            continue
        if len(holders) > 1 and move.get("reason") == "rollback" and holders[-2] == move["to"]:
            holders.pop()
            continue
        if not holders and isinstance(move.get("from"), int):
            holders.append(move["from"])
        holders.append(move["to"])
    while holders and holders[-1] == current:
        holders.pop()
    return holders[-1] if holders else None
