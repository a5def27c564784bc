"""The prompt cache's two memories: what leaves the model's device returns from the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import Backbone, load_backbone
from orchestrator.models.source import resolve_model
from orchestrator.serving.prompts.cache import PromptCache
from orchestrator.serving.prompts.served_prompt import ServedPrompt, load_prompt
from orchestrator.serving.prompts.store import PromptStore

SPAM = {0: " ham", 1: " spam"}


@pytest.fixture
def prompts(backbone: Backbone, make_artifact: Any) -> list[ServedPrompt]:
    folders = [make_artifact(f"spam-{seed}", verbalizer=SPAM, seed=seed) for seed in range(4)]
    return [
        load_prompt(backbone, folder, "spam", version) for version, folder in enumerate(folders)
    ]


def key(version: int) -> tuple[str, int]:
    return ("spam", version)


def test_what_left_comes_back(prompts: list[ServedPrompt]) -> None:
    """Prompts that left the device return from the host; the oldest is in neither.

    There is room for one on the device and for three in the host.
    """
    one = prompts[0].nbytes
    cache = PromptCache(one, 3 * one)
    gone = [cache.put(key(version), prompt) for version, prompt in enumerate(prompts)]
    assert gone == [[], [key(0)], [key(1)], [key(2)]]
    assert (len(cache), cache.nbytes, cache.host_len, cache.host_nbytes) == (1, one, 3, 3 * one)
    assert [key(version) in cache for version in range(4)] == [False, True, True, True]
    assert [cache.get(key(version)) is not None for version in range(4)] == [
        False,
        False,
        False,
        True,
    ]
    assert cache.bring(key(0)) is None
    found = cache.bring(key(1))
    assert found is not None and found[1] == [key(3)] and found[0].id == "spam:1"
    for tensor, before in zip(found[0].prepared.tensors, prompts[1].prepared.tensors, strict=True):
        assert torch.equal(tensor, before)
    assert cache.get(key(1)) is found[0]


def test_use_beside_the_model_counts_in_the_host(prompts: list[ServedPrompt]) -> None:
    """Use on the device counts in the host too, so a busy prompt is not dropped first."""
    one = prompts[0].nbytes
    cache = PromptCache(3 * one, 2 * one)
    cache.put(key(0), prompts[0])
    cache.put(key(1), prompts[1])
    cache.get(key(0))
    cache.put(key(2), prompts[2])
    assert [cache.bring(key(version)) is not None for version in range(3)] == [True, False, True]


def test_the_same_version_twice_is_counted_once(prompts: list[ServedPrompt]) -> None:
    cache = PromptCache(1 << 30, 1 << 30)
    for _ in range(2):
        cache.put(key(0), prompts[0])
    assert (len(cache), cache.nbytes, cache.host_nbytes) == (
        1,
        prompts[0].nbytes,
        prompts[0].nbytes,
    )


def test_nothing_is_kept_in_a_host_that_has_no_room(prompts: list[ServedPrompt]) -> None:
    cache = PromptCache(1, prompts[0].nbytes - 1)
    for version, prompt in enumerate(prompts):
        cache.put(key(version), prompt)
    assert (len(cache), cache.host_len) == (1, 0) and key(0) not in cache


def test_the_store_fetches_once(backbone: Backbone, registry: Any, make_artifact: Any) -> None:
    """With a host memory, each version is fetched once, however often they alternate."""
    registry.add("spam", 2, make_artifact("spam-2", verbalizer=SPAM, seed=2))
    store = PromptStore(backbone, registry, max_bytes=1, max_host_bytes=1 << 20)
    store.refresh()
    for _ in range(3):
        assert [store.get(f"spam:{version}").version for version in (1, 2)] == [1, 2]
    assert registry.fetched.count(("spam", 1)) == registry.fetched.count(("spam", 2)) == 1
    assert store.loaded_count == 1 and store.host_bytes > store.loaded_bytes
    assert store.counts["returns", "spam"] >= 4
    assert store.loaded("spam:1") is None  # the copy is too slow for the event loop


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
def test_an_accelerator_s_prompts_are_parked_in_the_host(model_folder: Any, registry: Any) -> None:
    """Copies are in the host's memory, and the prompts in use are on the device."""
    on_device = load_backbone(resolve_model(BaseModelSpec(id=str(model_folder))), "cuda")
    store = PromptStore(on_device, registry, max_bytes=1, max_host_bytes=1 << 20)
    store.refresh()
    first = store.get("spam")
    again = [store.get(name) for name in ("trec", "spam")][1]
    assert store.host_bytes > 0 and store.counts["returns", "spam"] > 0
    for tensor, before in zip(again.prepared.tensors, first.prepared.tensors, strict=True):
        assert tensor.device.type == "cuda" and torch.equal(tensor, before)
