"""The prompt store: the version that answers while aliases move and versions are bad.

Also while the registry is down.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from orchestrator.artifact import file_sha256
from orchestrator.errors import BadInput, Unreachable
from orchestrator.models.backbone import Backbone, make_backbone
from orchestrator.serving.prompts.cache import PromptCache
from orchestrator.serving.prompts.served_prompt import load_prompt
from orchestrator.serving.prompts.store import RETRY_SECONDS, ModelNotFound, PromptStore

SPAM = {0: " ham", 1: " spam"}


@pytest.fixture
def store(backbone: Backbone, registry: Any) -> PromptStore:
    store = PromptStore(backbone, registry)
    store.refresh()
    return store


def test_a_name_is_its_champion_and_versions_load_on_first_need(
    store: PromptStore, registry: Any, make_artifact: Any
) -> None:
    """name, name@alias and name:version find their version.

    A version without an alias is fetched when first requested, and only once.
    """
    registry.add("spam", 7, make_artifact("spam-7", verbalizer=SPAM, seed=5))
    assert store.get("spam") is store.get("spam@champion") is store.get("spam:1")
    assert store.loaded("spam:7") is None
    assert store.get("spam:7").version == 7
    assert store.loaded("spam:7") is store.get("spam:7")
    assert registry.fetched.count(("spam", 7)) == 1


def test_a_moved_alias_swaps(store: PromptStore, registry: Any, make_artifact: Any) -> None:
    """The next poll loads a moved alias's version; a prompt in use stays whole."""
    before = store.get("spam")
    registry.add(
        "spam", 2, make_artifact("spam-2", verbalizer=SPAM, seed=9), "champion", "challenger"
    )
    assert store.get("spam") is before
    store.refresh()
    assert (store.get("spam").version, before.version) == (2, 1)
    assert store.get("spam@challenger") is store.get("spam")
    assert [(card.id, card.version) for card in store.cards()] == [
        ("spam@challenger", 2),
        ("spam", 2),
        ("story", 1),
        ("trec", 1),
    ]


def test_requests_never_fail_while_aliases_move(
    backbone: Backbone, registry: Any, make_artifact: Any
) -> None:
    """Under constant moves every request gets one of the two versions."""
    registry.add("spam", 2, make_artifact("spam-2", verbalizer=SPAM, seed=9))
    store = PromptStore(backbone, registry, poll_seconds=0.001)
    store.start()
    seen: list[int] = []
    over = threading.Event()
    moves = threading.Thread(target=lambda: _move(registry, over))
    moves.start()
    give_up = time.monotonic() + 60  # reached only if the store never follows
    while (len(seen) < 1000 or set(seen) != {1, 2}) and time.monotonic() < give_up:
        seen.append((store.loaded("spam") or store.get("spam")).version)
    over.set()
    moves.join()
    store.close()
    assert set(seen) == {1, 2}


def _move(registry: Any, over: threading.Event) -> None:
    version = 1
    while not over.wait(0.01):
        version = 3 - version
        registry.aliases["spam"] = {"champion": version}


def altered(folder: Path) -> Path:
    file = folder / "prompt.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    return folder


def not_finite(folder: Path) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    weights = np.full(
        (manifest["num_virtual_tokens"], manifest["base_model"]["hidden_size"]), np.nan, np.float32
    )
    save_file({"prompt": weights}, folder / "prompt.safetensors")
    manifest["weights_sha256"] = file_sha256(folder / "prompt.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


BAD: dict[str, Any] = {
    "another base model": lambda make, other: make("bad", on=other, verbalizer=SPAM),
    "altered": lambda make, other: altered(make("bad", verbalizer=SPAM)),
    "not finite": lambda make, other: not_finite(make("bad", verbalizer=SPAM)),
    "wrong width": lambda make, other: make("bad", verbalizer=SPAM, width=16),
    "too long for the context": lambda make, other: make("bad", tokens=200, verbalizer=SPAM),
    "no files": lambda make, other: Path("/nonexistent"),
    "labels with the same tokens": lambda make, other: make("bad", verbalizer={0: " x", 1: " x"}),
    "a template without a column": lambda make, other: make(
        "bad", verbalizer=SPAM, template="Spam?"
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_version_is_refused_and_the_old_one_goes_on(
    kind: str,
    store: PromptStore,
    registry: Any,
    make_artifact: Any,
    other_backbone: Backbone,
    caplog: Any,
) -> None:
    """A bad new champion is logged once and never served; the old one answers."""
    registry.add("spam", 2, BAD[kind](make_artifact, other_backbone), "champion")
    for _ in range(3):
        store.refresh()
    assert store.get("spam").version == 1
    assert len([it for it in caplog.records if "version 2 of spam is refused" in it.message]) == 1
    with pytest.raises(ModelNotFound) as refusal:
        store.get("spam:2")
    assert "/" not in refusal.value.message  # no path of this machine
    registry.add("spam", 3, make_artifact("spam-3", verbalizer=SPAM, seed=3), "champion")
    store.refresh()
    assert store.get("spam").version == 3


def test_a_tokenizer_of_another_model_is_refused(backbone: Backbone, make_artifact: Any) -> None:
    """With another tokenizer the same weights would read other text."""
    info = backbone.info
    changed = type(info)(**{**vars(info), "tokenizer_digest": "other"})
    other = make_backbone(backbone.model, backbone.tokenizer, changed)
    with pytest.raises(BadInput, match="tokenizer"):
        load_prompt(backbone, make_artifact("p", on=other, verbalizer=SPAM), "p", 1)


def test_a_repaired_version_is_taken_up_again(
    store: PromptStore, registry: Any, make_artifact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A refused version is tried again after a while."""
    registry.add("spam", 2, altered(make_artifact("spam-2", verbalizer=SPAM)), "champion")
    store.refresh()
    registry.add("spam", 2, make_artifact("spam-2-good", verbalizer=SPAM), "champion")
    store.refresh()
    assert store.get("spam").version == 1
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + RETRY_SECONDS + 1)
    store.refresh()
    assert store.get("spam").version == 2


def test_an_outage_keeps_what_is_loaded(
    store: PromptStore, registry: Any, make_artifact: Any, caplog: Any
) -> None:
    """While the registry is down, loaded prompts answer and others are unavailable.

    Afterwards moves are followed.
    """
    registry.add("spam", 2, make_artifact("spam-2", verbalizer=SPAM), "champion")
    registry.away = True
    for _ in range(3):
        store.refresh()
    assert store.get("spam").version == 1
    with pytest.raises(Unreachable):
        store.get("spam:2")
    assert len([it for it in caplog.records if "does not answer" in it.message]) == 1
    registry.away = False
    store.refresh()
    assert store.get("spam").version == 2


def test_starting_during_an_outage_waits_for_the_registry(
    backbone: Backbone, registry: Any
) -> None:
    """Models are unavailable rather than unknown, and answer once the registry is back."""
    registry.away = True
    store = PromptStore(backbone, registry)
    store.refresh()
    with pytest.raises(Unreachable):
        store.get("spam")
    registry.away = False
    store.refresh()
    assert store.get("spam").version == 1


def test_memory_is_bounded(backbone: Backbone, registry: Any, make_artifact: Any) -> None:
    """The least recently used prompt leaves memory, and is loaded again when requested."""
    one = load_prompt(backbone, registry.folders["spam", 1], "spam", 1).nbytes
    for version in range(2, 6):
        registry.add(
            "spam", version, make_artifact(f"spam-{version}", verbalizer=SPAM, seed=version)
        )
    registry.aliases = {"spam": {"champion": 1}}
    store = PromptStore(backbone, registry, max_bytes=2 * one)
    store.refresh()
    for version in (2, 1, 3):
        store.get(f"spam:{version}")
    assert store.loaded_bytes == 2 * one
    assert [store.loaded(f"spam:{version}") is not None for version in (1, 2, 3)] == [
        True,
        False,
        True,
    ]
    assert store.get("spam:2").version == 2
    assert [card.id for card in store.cards()] == ["spam"]


def test_a_prompt_larger_than_the_memory_still_serves(backbone: Backbone, registry: Any) -> None:
    """The limit always leaves room for the prompt in use."""
    store = PromptStore(backbone, registry, max_bytes=1)
    store.refresh()
    assert [store.get(name).name for name in ("spam", "trec", "spam")] == ["spam", "trec", "spam"]
    assert store.loaded_count == 1


@pytest.mark.parametrize(
    ("served", "allowed", "refused"),
    [
        ((), ["spam", "spam:1", "spam@challenger", "trec"], []),
        (("spam",), ["spam", "spam@challenger", "spam:1", "spam:2"], ["trec", "trec:1"]),
        (("spam@challenger",), ["spam@challenger"], ["spam", "spam:2", "trec"]),
        (
            ("spam:2", "models:/trec@champion"),
            ["spam:2", "trec"],
            ["spam", "spam:1", "spam@challenger", "trec:1"],
        ),
    ],
)
def test_only_the_listed_models_are_served(
    backbone: Backbone, registry: Any, make_artifact: Any, served: Any, allowed: Any, refused: Any
) -> None:
    """A bare name allows all of its versions, a full reference only itself."""
    registry.add("spam", 2, make_artifact("spam-2", verbalizer=SPAM), "challenger")
    store = PromptStore(backbone, registry, served)
    store.refresh()
    for model in allowed:
        assert store.get(model)
    for model in refused:
        with pytest.raises(ModelNotFound):
            store.get(model)
    assert all(store.get(card.id) for card in store.cards())


@pytest.mark.parametrize(
    "model",
    [
        "sapm",
        "spam@x",
        "spam:9",
        "spam:0",
        "spam:99999999999999999999",
        "@",
        ":1",
        "a/../b",
        "models:/",
        "\0",
        "spam:1:1",
    ],
)
def test_unknown_models_are_not_found(store: PromptStore, model: str) -> None:
    """Any other name is refused as not found, each time."""
    for _ in range(2):
        with pytest.raises(ModelNotFound, match="does not exist"):
            store.get(model)


def test_an_unknown_name_is_answered_with_the_nearest(store: PromptStore) -> None:
    """The message suggests the nearest name and lists those that exist."""
    with pytest.raises(ModelNotFound, match=r"did you mean 'spam'.*known: spam, story, trec"):
        store.get("sapm")


def test_names_with_separators_are_found(
    store: PromptStore, registry: Any, make_artifact: Any
) -> None:
    """A registry may hold names that contain @ and colons."""
    registry.add("a@b:1", 1, make_artifact("odd", verbalizer=SPAM), "champion")
    store.refresh()
    assert store.get("a@b:1").name == store.get("a@b:1@champion").name == "a@b:1"


def test_one_load_for_many_callers(backbone: Backbone, registry: Any) -> None:
    """Callers that need the same version at once wait for one load."""
    store = PromptStore(backbone, registry)
    store.refresh()
    store._cache = PromptCache(1 << 30)
    registry.fetched.clear()
    threads = [threading.Thread(target=store.get, args=("spam",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert registry.fetched == [("spam", 1)]
