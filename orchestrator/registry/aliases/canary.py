"""What serving follows: a registered model's aliases, and its canary, which is a tag on the model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import BadInput
from orchestrator.job.spec import ALIAS_PATTERN

CANARY_TAG = "orchestrator.canary"


@dataclass(frozen=True)
class Canary:
    """A share of a name's traffic for another alias."""

    alias: str
    percent: float
    """0 to 100."""

    def __str__(self) -> str:
        return f"{self.alias}:{self.percent:g}"


@dataclass(frozen=True)
class LiveModel:
    """One registered prompt as serving sees it: alias to version, and its canary if it has one."""

    aliases: Mapping[str, int]
    canary: Canary | None = None


def make_canary(alias: str, percent: float) -> Canary:
    """BadInput for a share that is none, or an alias that can't be one."""
    if not re.fullmatch(ALIAS_PATTERN, alias):
        raise BadInput(f"{alias!r} can't be an alias", f"allowed: {ALIAS_PATTERN}")
    if not 0 < percent <= 100:
        raise BadInput(
            f"a canary of {percent:g} percent is none", "give a share above 0 and up to 100"
        )
    return Canary(alias, percent)


def read_canary(text: str | None) -> Canary | None:
    """The canary of a tag, which anybody may have edited: what can't be read is no canary."""
    alias, _, percent = (text or "").rpartition(":")
    try:
        return make_canary(alias, float(percent))
    except (BadInput, ValueError):
        return None
