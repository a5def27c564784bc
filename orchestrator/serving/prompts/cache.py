"""Which prompts are in memory: the most recently used ones where the model computes, more of them in the host's memory.

A prompt's keys and values are computed once. What leaves an accelerator's memory keeps its copy in the host's, and to
come back costs one copy instead of a fetch and a forward. Where the model runs on a CPU the two are the same memory.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch

from orchestrator.serving.prompts.served_prompt import ServedPrompt

Key = tuple[str, int]


class PromptCache:
    """Loaded prompts by registered model and version, least recently used dropped first. Not safe between threads."""

    def __init__(self, max_bytes: int, max_host_bytes: int = 0) -> None:
        """At most so many bytes of keys and values beside the model, and in the host's memory; 0 keeps none there."""
        self._near = _Shelf(max_bytes)
        self._host = _Shelf(max_host_bytes)
        self._device = torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """Of the prompts beside the model."""
        return self._near.nbytes

    @property
    def host_nbytes(self) -> int:
        return self._host.nbytes

    def __len__(self) -> int:
        """Prompts beside the model, ready for a forward."""
        return len(self._near)

    @property
    def host_len(self) -> int:
        return len(self._host)

    def __contains__(self, key: Key) -> bool:
        return key in self._near or key in self._host

    def ready(self, key: Key) -> ServedPrompt | None:
        """The prompt, if it is beside the model; now the most recently used one."""
        self._host.touch(key)
        return self._near.touch(key)

    def bring(self, key: Key) -> tuple[ServedPrompt, list[Key]] | None:
        """The prompt with its keys and values copied back beside the model, and what left for it; None if it is in
        neither memory."""
        parked = self._host.touch(key)
        if parked is None:
            return None
        prompt = replace(parked, prepared=parked.prepared.to(self._device))
        return prompt, self._put_near(key, prompt)

    def put(self, key: Key, prompt: ServedPrompt) -> list[Key]:
        """Keep a prompt that was just loaded; returns those that have left the model's memory. The newest stays,
        whatever its size."""
        self._device = next((tensor.device for tensor in prompt.prepared.tensors), self._device)
        if prompt.nbytes <= self._host.max_bytes:
            self._host.put(key, replace(prompt, prepared=prompt.prepared.to(torch.device("cpu"))))
            self._host.shrink()
        return self._put_near(key, prompt)

    def _put_near(self, key: Key, prompt: ServedPrompt) -> list[Key]:
        self._near.put(key, prompt)
        return self._near.shrink()


class _Shelf:
    """Prompts in the order of their last use, and their bytes."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._prompts: OrderedDict[Key, ServedPrompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, key: Key) -> bool:
        return key in self._prompts

    def touch(self, key: Key) -> ServedPrompt | None:
        prompt = self._prompts.get(key)
        if prompt is not None:
            self._prompts.move_to_end(key)
        return prompt

    def put(self, key: Key, prompt: ServedPrompt) -> None:
        before = self._prompts.pop(key, None)
        self.nbytes += prompt.nbytes - (before.nbytes if before else 0)
        self._prompts[key] = prompt

    def shrink(self) -> list[Key]:
        """What had to go, the least recently used first; one prompt always stays."""
        gone = []
        while self.nbytes > self.max_bytes and len(self._prompts) > 1:
            key, prompt = self._prompts.popitem(last=False)
            self.nbytes -= prompt.nbytes
            gone.append(key)
        return gone
