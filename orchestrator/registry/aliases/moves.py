"""An alias's history: every move in order, and whom a rollback puts back. Pure values."""

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
    """Whoever moves an alias: the login at the MLflow server, or the user of this machine."""
    if login := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return login
    try:
        return f"{getpass.getuser()}@{platform.node()}"
    except (OSError, KeyError):  # a container's user without a name
        return platform.node()


@dataclass(frozen=True)
class Move:
    """One entry: ``alias`` went from version ``old`` (None: it was not there) to ``new`` (None: it was taken away).

    ``kind``: promoted by a person, forced past the gate, by a search, rolled back, set without a comparison, or found
    moved by something that keeps no history (elsewhere).
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
    """Tells two programs apart that write the same entry at once."""

    @property
    def key(self) -> str:
        return f"{self.alias}.{self.number:06}"

    def text(self) -> str:
        return json.dumps({**asdict(self), "reason": self.reason[:MAX_REASON]}, ensure_ascii=False)

    def sentence(self) -> str:
        """version 5, before that 4: promoted by ann, 2026-11-21T10:00:00+00:00 (reason)"""
        to = "taken away" if self.new is None else f"version {self.new}"
        was = "" if self.old is None else f", before that {self.old}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{to}{was}: {HOW[self.kind]} by {self.by}, {self.at}{reason}"


def read_moves(params: Mapping[str, str]) -> list[Move]:
    """The moves among a run's parameters, oldest first for each alias; what is no entry is passed over."""
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
    """Whom a rollback puts back in the place of ``current``, which may have got there without being on record.

    Rolling back twice goes back two moves: an undone move is no longer history.
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
