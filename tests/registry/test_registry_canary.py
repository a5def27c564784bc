"""Canaries in the registry: a tag that serving polls, checked when it is set."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import BadInput
from orchestrator.registry import Canary, LiveModel, Registry
from orchestrator.registry.aliases.canary import CANARY_TAG, read_canary


def test_a_canary_is_set_seen_and_ended(
    registry: Registry, name: str, register: Callable[..., int]
) -> None:
    """Polling sees aliases and canary together; ending returns the canary that was set."""
    registry.set_alias(name, "champion", register(accuracy=0.8))
    registry.set_alias(name, "challenger", register(accuracy=0.9))
    aliases = {"champion": 1, "challenger": 2}
    assert registry.live()[name] == LiveModel(aliases)
    registry.set_canary(name, "challenger", 12.5)
    assert registry.live()[name] == LiveModel(aliases, Canary("challenger", 12.5))
    assert registry.end_canary(name) == Canary("challenger", 12.5)
    assert registry.end_canary(name) is None
    assert registry.live()[name] == LiveModel(aliases)
    with pytest.raises(BadInput, match="no alias 'chalenger'") as refused:
        registry.set_canary(name, "chalenger", 10)
    assert "challenger" in refused.value.hint
    with pytest.raises(BadInput, match="no alias 'champion' beside"):
        registry.set_canary(name, "champion", 10)
    for percent in (0.0, -1.0, 101.0, float("nan")):
        with pytest.raises(BadInput, match="percent is none"):
            registry.set_canary(name, "challenger", percent)


@pytest.mark.parametrize(
    "tag", [None, "", "challenger", ":5", "challenger:", "challenger:x", "a b:5", "c:0", "c:nan"]
)
def test_a_tag_that_is_no_canary(tag: str | None) -> None:
    """Anybody may edit the tag; a malformed one means that there is no canary."""
    assert read_canary(tag) is None


def test_a_tag_is_read_back() -> None:
    assert read_canary(str(Canary("challenger", 2.5))) == Canary("challenger", 2.5)


def test_the_verb(
    registry: Registry,
    name: str,
    register: Callable[..., int],
    command: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The verb sets and ends a canary, as text and as JSON.

    It refuses an alias together with ``--end``, and a call with neither.
    """
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    registry.set_alias(name, "champion", register(accuracy=0.8))
    registry.set_alias(name, "next", register(accuracy=0.9))
    said = command("canary", name, "next", "--percent", 20)
    assert said.code == 0 and f"20 % of the requests for {name} go to {name}@next" in said.out
    assert registry._model(name).tags[CANARY_TAG] == "next:20"
    assert json.loads(command("canary", name, "--end", "--json").out) == {
        "name": name, "canary": None, "ended": {"alias": "next", "percent": 20.0},
    }  # fmt: skip
    assert "had no canary" in command("canary", name, "--end").out
    assert command("canary", name).code == 2 and command("canary", name, "next", "--end").code == 2


def test_the_verb_that_makes_keys(command: Any, tmp_path: Path) -> None:
    """The key is printed on standard output only; the file holds its digest."""
    file = tmp_path / "keys.json"
    said = command("key", "web", "--file", file, "--model", "spam", "--per-minute", 5)
    secret = said.out.strip()
    assert said.code == 0 and secret.startswith("sk-") and "ORCHESTRATOR_API_KEYS_FILE" in said.err
    (entry,) = json.loads(file.read_text())
    assert (entry["name"], entry["models"], entry["per_minute"]) == (
        "web",
        ["spam"],
        5,
    ) and secret not in str(entry)
    assert command("key", "web", "--file", file).code == 2
