"""The history of an alias as pure values: its moves in order, and the target of a rollback."""

from __future__ import annotations

import getpass
import json
import os
import platform
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Literal

Kind = Literal["promoted", "forced", "search", "rollback", "set", "elsewhere"]
MAX_REASON = 1000
HOW: dict[Kind, str] = {
    "promoted": "promoted",
    "forced": "forced past the gate",
    "search": "moved after a search",
    "rollback": "rolled back",
    "set": "set",
    "elsewhere": "moved elsewhere, noticed",
}


def who() -> str:
    """Name the user who moves an alias: the MLflow server's login, or this machine's user."""
    if login := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return login
    try:
        return f"{getpass.getuser()}@{platform.node()}"
    except (OSError, KeyError):  # a container's user may have no name
        return platform.node()


@dataclass(frozen=True)
class Move:
    """One entry: ``alias`` moved from version ``old`` to version ``new``.

    ``old`` is None for a new alias, and ``new`` is None for a removed alias. ``kind`` is promoted
    (by a person), forced (past the gate), search (moved after a search), rollback, set (without a
    comparison), or elsewhere (found moved by a program that keeps no history).
    """

    alias: str
    number: int
    old: int | None
    new: int | None
    kind: Kind
    reason: str = ""
    by: str = field(default_factory=who)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Distinguishes two programs that write the same entry at the same time."""

    @property
    def key(self) -> str:
        return f"{self.alias}.{self.number:06}"

    def text(self) -> str:
        return json.dumps({**asdict(self), "reason": self.reason[:MAX_REASON]}, ensure_ascii=False)

    def sentence(self) -> str:
        """Describe the move in words.

        For example: version 5, before that 4: promoted by ann, 2026-11-21T10:00:00+00:00 (reason)
        """
        to = "taken away" if self.new is None else f"version {self.new}"
        was = "" if self.old is None else f", before that {self.old}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{to}{was}: {HOW[self.kind]} by {self.by}, {self.at}{reason}"


def read_moves(params: Mapping[str, str]) -> list[Move]:
    """Parse the moves among a run's parameters, sorted by alias and then oldest first.

    Parameters that are not valid entries are skipped.
    """
    moves = []
    for key, text in params.items():
        try:
            move = Move(**json.loads(text))
        except (ValueError, TypeError):
            continue
        if isinstance(move.number, int) and move.key == key and move.kind in HOW:
            moves.append(move)
    return sorted(moves, key=lambda move: (move.alias, move.number))


def former_holder(moves: Sequence[Move], alias: str, current: int | None) -> int | None:
    """Return the version that a rollback of the alias from ``current`` restores.

    ``current`` may have become the holder without a recorded move. Two rollbacks go back two moves,
    because a move that was undone no longer counts as history.
    """
    holders: list[int | None] = []
    for move in moves:
        if move.alias != alias:
            continue
        if move.kind == "rollback" and len(holders) > 1 and holders[-2] == move.new:
            holders.pop()
            continue
        if not holders:
            holders.append(move.old)
        holders.append(move.new)
    return next((holder for holder in reversed(holders) if holder not in (None, current)), None)
