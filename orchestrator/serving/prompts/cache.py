"""The cache of loaded prompts, with one level in the model's memory and one in the host's.

A prompt's keys and values are computed once. The most recently used prompts are in the memory of
the device that runs the model. A prompt that is evicted from an accelerator keeps its copy in the
host's memory, so that bringing it back costs one copy instead of a fetch and a forward. When the
model runs on a CPU, both levels are the same memory and the host level is not used.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

import torch

from orchestrator.serving.prompts.served_prompt import ServedPrompt

Key = tuple[str, int]


class PromptCache:
    """A cache of loaded prompts by registered model and version, with LRU eviction.

    Not thread-safe.
    """

    def __init__(self, max_bytes: int, max_host_bytes: int = 0) -> None:
        """Set the limits in bytes of keys and values, in the model's memory and in the host's.

        ``max_host_bytes=0`` keeps no prompts in the host's memory.
        """
        self._near = _Shelf(max_bytes)
        self._host = _Shelf(max_host_bytes)
        self._device = torch.device("cpu")

    @property
    def nbytes(self) -> int:
        """The bytes of the prompts in the model's memory."""
        return self._near.nbytes

    @property
    def host_nbytes(self) -> int:
        """The bytes of the prompts in the host's memory."""
        return self._host.nbytes

    def __len__(self) -> int:
        """Return the number of prompts in the model's memory, ready for a forward."""
        return len(self._near)

    @property
    def host_len(self) -> int:
        """The number of prompts in the host's memory."""
        return len(self._host)

    def __contains__(self, key: Key) -> bool:
        return key in self._near or key in self._host

    def get(self, key: Key) -> ServedPrompt | None:
        """Return a prompt in the model's memory and mark it as most recently used, or None."""
        self._host.touch(key)
        return self._near.touch(key)

    def bring(self, key: Key) -> tuple[ServedPrompt, list[Key]] | None:
        """Copy a prompt from the host's memory back to the model's.

        Returns the prompt and the keys of the prompts evicted for it; None if the host's memory
        does not hold the prompt.
        """
        parked = self._host.touch(key)
        if parked is None:
            return None
        prompt = replace(parked, prepared=parked.prepared.to(self._device))
        return prompt, self._put_near(key, prompt)

    def put(self, key: Key, prompt: ServedPrompt) -> list[Key]:
        """Add a prompt that was just loaded; return the keys evicted from the model's memory.

        The new prompt stays even if it alone exceeds the limit.
        """
        self._device = next((tensor.device for tensor in prompt.prepared.tensors), self._device)
        if prompt.nbytes <= self._host.max_bytes:
            self._host.put(key, replace(prompt, prepared=prompt.prepared.to(torch.device("cpu"))))
            self._host.shrink()
        return self._put_near(key, prompt)

    def _put_near(self, key: Key, prompt: ServedPrompt) -> list[Key]:
        self._near.put(key, prompt)
        return self._near.shrink()


class _Shelf:
    """One level of the cache: prompts in the order of their last use."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._prompts: OrderedDict[Key, ServedPrompt] = OrderedDict()

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, key: Key) -> bool:
        return key in self._prompts

    def touch(self, key: Key) -> ServedPrompt | None:
        """Return a prompt and mark it as most recently used; None if it is not here."""
        prompt = self._prompts.get(key)
        if prompt is not None:
            self._prompts.move_to_end(key)
        return prompt

    def put(self, key: Key, prompt: ServedPrompt) -> None:
        before = self._prompts.pop(key, None)
        self.nbytes += prompt.nbytes - (before.nbytes if before else 0)
        self._prompts[key] = prompt

    def shrink(self) -> list[Key]:
        """Evict the least recently used prompts until the rest fits; return their keys.

        One prompt always stays.
        """
        evicted = []
        while self.nbytes > self.max_bytes and len(self._prompts) > 1:
            key, prompt = self._prompts.popitem(last=False)
            self.nbytes -= prompt.nbytes
            evicted.append(key)
        return evicted
