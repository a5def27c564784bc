"""The parts of a registered model that servers follow: its aliases and its canary.

A canary is a tag on the registered model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import BadInput
from orchestrator.job.spec import ALIAS_PATTERN

CANARY_TAG = "orchestrator.canary"


@dataclass(frozen=True)
class Canary:
    """A share of a registered model's traffic that goes to another alias."""

    alias: str
    percent: float
    """The share, above 0 and at most 100."""

    def __str__(self) -> str:
        return f"{self.alias}:{self.percent:g}"


@dataclass(frozen=True)
class LiveModel:
    """One registered prompt as servers see it: the version of each alias, and the canary if any."""

    aliases: Mapping[str, int]
    canary: Canary | None = None


def make_canary(alias: str, percent: float) -> Canary:
    """Check and build a canary; raise BadInput for a share out of range or an invalid alias."""
    if not re.fullmatch(ALIAS_PATTERN, alias):
        raise BadInput(f"{alias!r} can't be an alias", f"allowed: {ALIAS_PATTERN}")
    if not 0 < percent <= 100:
        raise BadInput(
            f"a canary of {percent:g} percent is none", "give a share above 0 and up to 100"
        )
    return Canary(alias, percent)


def read_canary(text: str | None) -> Canary | None:
    """Parse a canary's tag; return None for a tag that is missing or was edited badly."""
    alias, _, percent = (text or "").rpartition(":")
    try:
        return make_canary(alias, float(percent))
    except (BadInput, ValueError):
        return None
