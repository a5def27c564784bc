"""The frozen backbone: load, freeze, embed, forward. The only place that knows model families.

Shapes: B rows, P virtual tokens, T input tokens, Y target tokens, H width, L layers, K trials (or served prompts), V
vocabulary.

Two exact ways to put a prompt in front of a row (docs/decisions.md has the measurements):

* **prompt once**: the K prompts run through the model as [K, P, H]; their keys and values are shared by all rows. In a
  causal model the prompt attends to nothing but itself, so it is the same for every row (prefix caching, but
  differentiable). Prompts are padded on the right, rows on the left; positions are explicit.
* **concatenation**: [P; T] for every row, padded on the right. Exact for every causal model, also with sliding windows.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orchestrator.base_model import BaseModelInfo, ModelSource, quiet_transformers
from orchestrator.errors import BadInput

# Checked in float64 against unpadded rows: loss and gradient agree when the prompt runs once (docs/decisions.md).
PROMPT_ONCE_FAMILIES = frozenset(
    {"llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "phi", "falcon", "olmo2", "granite"}
)


@dataclass(frozen=True)
class PreparedPrompts:
    """K prompts, ready to stand in front of rows.

    ``tensors``: with the prompt run once, key and value of each layer, [K, kv heads, P, head width]; otherwise one
    tensor of embeddings [K, P, H]. ``lengths`` [K]: virtual tokens of each; shorter ones are padded on the right.
    """

    tensors: tuple[Tensor, ...]
    lengths: Tensor

    @property
    def width(self) -> int:
        """The padded prompt length P."""
        return int(self.tensors[0].shape[-2])

    def leaf(self) -> PreparedPrompts:
        """The same values cut off from their graph, ready to collect gradients over several micro-batches."""
        return replace(self, tensors=tuple(tensor.detach().requires_grad_() for tensor in self.tensors))

    def backward_from(self, leaf: PreparedPrompts) -> None:
        """Send the gradients collected by ``leaf`` on to the prompts."""
        torch.autograd.backward(self.tensors, [tensor.grad for tensor in leaf.tensors])


@dataclass(frozen=True)
class Rows:
    """Padded token rows, each in front of one prompt.

    ``ids`` [B, T+Y], ``mask`` [B, T+Y] true at real tokens, ``prompt`` [B] index of the row's prompt. Rows are padded
    on the left, so that targets end at the right edge.
    """

    ids: Tensor
    mask: Tensor
    prompt: Tensor

    @classmethod
    def pad(cls, sequences: Sequence[Sequence[int]], prompt: Sequence[int], backbone: Backbone) -> Rows:
        """Token sequences of any lengths, each with the index of its prompt."""
        width, device = max(map(len, sequences)), backbone.device
        ids = [[backbone.pad_id] * (width - len(sequence)) + list(sequence) for sequence in sequences]
        lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
        mask = torch.arange(width, device=device)[None, :] >= (width - lengths)[:, None]
        return cls(torch.tensor(ids, device=device), mask, torch.tensor(list(prompt), device=device))


@dataclass
class RowState:
    """Rows after a forward: ``logits`` [B, V] of the last column, keys and values so far, ``mask`` over all columns so
    far, and each row's next position [B]."""

    logits: Tensor
    cache: Any
    mask: Tensor
    positions: Tensor

    def select(self, rows: Tensor) -> RowState:
        """The state of the given rows, in that order, with repetition."""
        from transformers import DynamicCache

        layers = [(layer.keys.index_select(0, rows), layer.values.index_select(0, rows)) for layer in self.cache.layers]
        return RowState(self.logits[rows], DynamicCache(layers), self.mask[rows], self.positions[rows])


class Backbone:
    """A frozen causal language model with its tokenizer."""

    def __init__(self, model: nn.Module, tokenizer: Any, info: BaseModelInfo, prompt_once: bool | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.info = info
        self.prompt_once = runs_prompt_once(model.config) if prompt_once is None else prompt_once

    @property
    def device(self) -> torch.device:
        return self.table.device

    @property
    def table(self) -> Tensor:
        """The input embedding table, [V, H]."""
        weight: Tensor = self.model.get_input_embeddings().weight  # type: ignore[operator]
        return weight

    @property
    def pad_id(self) -> int:
        """Any id of the table will do where the mask is false; a tokenizer's own may lie outside it."""
        return 0

    def embed(self, ids: Tensor) -> Tensor:
        """What enters the model for token ids: rows of the table, scaled where the family does so (Gemma)."""
        embeddings: Tensor = self.model.get_input_embeddings()(ids)  # type: ignore[operator]
        return embeddings

    def prepare(self, prompts: Sequence[Tensor]) -> PreparedPrompts:
        """K prompts [P_k, H] to what stands in front of rows; differentiable. float32 prompts are cast here."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        padded = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True).to(self.device, self.table.dtype)
        if not self.prompt_once:
            return PreparedPrompts((padded,), lengths)
        # No mask: the pads are on the right, where no real virtual token looks, and rows mask them out later.
        cache = self._body(inputs_embeds=padded, use_cache=True).past_key_values
        return PreparedPrompts(
            tuple(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)), lengths
        )

    def target_logits(self, prompts: PreparedPrompts | None, rows: Rows, keep: int) -> Tensor:
        """Logits [B, keep, V] at the last ``keep`` columns of the rows, which end at the right edge.

        ``prompts=None`` is the model as it stands, without a prompt.
        """
        if not self.prompt_once:
            return self._concatenated(prompts or self._no_prompt(), rows, keep)
        logits: Tensor = self._continue(prompts, rows, keep)[0].logits
        return logits

    def run(self, prompts: PreparedPrompts | None, rows: Rows) -> RowState:
        """The rows' last logits, and the state to go on from. Needs the prompt-once path."""
        out, mask, positions = self._continue(prompts, rows, keep=1)
        return RowState(out.logits[:, -1], out.past_key_values, mask, positions[:, -1] + 1)

    def extend(self, state: RowState, ids: Tensor, mask: Tensor) -> tuple[Tensor, RowState]:
        """Feed further tokens [B, n], padded on the right, after rows already run: logits [B, n, V] and the new state.

        The state's cache grows in place: a state is used once. ``logits`` of the new state are those of column n - 1.
        """
        full = torch.cat([state.mask, mask], dim=1)
        positions = state.positions[:, None] + (mask.cumsum(1) - 1).clamp(min=0)
        out = self.model(
            input_ids=ids,
            attention_mask=full.long(),
            position_ids=positions,
            past_key_values=state.cache,
            use_cache=True,
        )
        return out.logits, RowState(out.logits[:, -1], out.past_key_values, full, state.positions + mask.sum(1))

    def _continue(self, prompts: PreparedPrompts | None, rows: Rows, keep: int) -> tuple[Any, Tensor, Tensor]:
        mask, positions, cache = rows.mask, (rows.mask.cumsum(1) - 1).clamp(min=0), None
        if prompts is not None:
            lengths = prompts.lengths[rows.prompt]
            prompt_mask = torch.arange(prompts.width, device=mask.device)[None, :] < lengths[:, None]
            mask = torch.cat([prompt_mask, mask], dim=1)
            positions = positions + lengths[:, None]
            cache = _cache_for(prompts.tensors, rows.prompt)
        out = self.model(
            input_ids=rows.ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out, mask, positions

    def _no_prompt(self) -> PreparedPrompts:
        """One prompt of no tokens. A cache would do for some families, but not for sliding windows or recurrence."""
        empty = self.table.new_zeros(1, 0, self.table.shape[1])
        return PreparedPrompts((empty,), torch.zeros(1, dtype=torch.long, device=self.device))

    def _concatenated(self, prompts: PreparedPrompts, rows: Rows, keep: int) -> Tensor:
        """[prompt; row; pads], with no hole in between: each row is gathered to stand right after its prompt."""
        lengths, row_lengths = prompts.lengths[rows.prompt], rows.mask.sum(1)
        left_pads = rows.ids.shape[1] - row_lengths
        place = torch.arange(prompts.width + rows.ids.shape[1], device=self.device)[None, :].expand(len(rows.ids), -1)
        source = torch.cat([prompts.tensors[0][rows.prompt], self.embed(rows.ids)], dim=1)
        from_row = place + (prompts.width + left_pads - lengths)[:, None]
        index = torch.where(place < lengths[:, None], place, from_row.clamp(max=source.shape[1] - 1))
        embeds = source.gather(1, index[:, :, None].expand(-1, -1, source.shape[2]))
        ends = lengths + row_lengths
        wanted = (ends[:, None] - keep + torch.arange(keep, device=self.device)).clamp(min=0)
        first = int(wanted.min())
        logits = self.model(
            inputs_embeds=embeds,
            attention_mask=(place < ends[:, None]).long(),
            use_cache=False,
            logits_to_keep=torch.arange(first, place.shape[1], device=self.device),
            **({"position_ids": place} if self._takes_positions else {}),
        ).logits
        return torch.take_along_dim(logits, (wanted - first)[:, :, None], dim=1)

    @cached_property
    def _takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.model.forward).parameters

    def _body(self, **inputs: Any) -> Any:
        """The model without its head, which would compute [K, P, V] logits that nobody reads."""
        return self.model.base_model(**inputs)  # type: ignore[operator]

    def digest(self) -> str:
        """sha256 over the weights in memory: the same before and after a search."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def _cache_for(tensors: tuple[Tensor, ...], prompt: Tensor) -> Any:
    """A transformers cache that holds, for each row, its own prompt's keys and values."""
    from transformers import DynamicCache

    if tensors[0].shape[0] == 1:
        rows = [tensor.expand(len(prompt), -1, -1, -1) for tensor in tensors]
    else:
        rows = [tensor.index_select(0, prompt) for tensor in tensors]
    return DynamicCache(list(zip(rows[::2], rows[1::2], strict=True)))


def runs_prompt_once(config: Any) -> bool:
    """Whether the prompt may run once for all rows: a checked family in which every layer attends to everything."""
    layers = getattr(config, "layer_types", None)
    full = all(kind == "full_attention" for kind in layers) if layers else not getattr(config, "sliding_window", None)
    return config.model_type in PROMPT_ONCE_FAMILIES and full and not getattr(config, "alibi", False)


def load_backbone(source: ModelSource, device: str | torch.device = "cpu", dtype: str = "auto") -> Backbone:
    """Load a checked base model and freeze it. Weights come from safetensors only, and no model code is run."""
    fingerprint = weights_fingerprint(source)  # finds missing and damaged files before anything large is built
    device = torch.device(device)
    model = _load_model(source, _dtype(dtype, device)).to(device)
    backbone = Backbone(model, source.tokenizer(), source.info(fingerprint))
    if reason := why_not_exact(backbone):
        raise BadInput(f"base_model.id {source.id!r} can't be tuned: {reason}", "choose another causal language model")
    return backbone


@torch.inference_mode()
def why_not_exact(backbone: Backbone) -> str:
    """Why prompts can't be tuned on this model, or nothing: tried out on two rows that differ in their last token."""
    ids = torch.arange(1, 11, device=backbone.device).view(2, 5) % len(backbone.table)
    ids[1, :-1] = ids[0, :-1]
    mask = torch.ones_like(ids)
    logits = backbone.model(input_ids=ids, attention_mask=mask).logits
    embedded = backbone.model(inputs_embeds=backbone.embed(ids), attention_mask=mask).logits
    scale = float(logits.abs().max())
    # Within one forward a causal model's rows agree to the bit; two forwards may differ by rounding.
    if float((logits[0, :-1] - logits[1, :-1]).abs().max()) > 1e-3 * scale:
        return "what it predicts depends on the tokens that come later, so it is not causal"
    if float((logits - embedded).abs().max()) > 1e-2 * scale:
        return "it looks at token ids besides their embeddings, and virtual tokens have none"
    return ""


def _load_model(source: ModelSource, dtype: Any) -> Any:
    quiet_transformers()
    from transformers import AutoModelForCausalLM

    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise source.unusable_weights(str(error)) from None
    if missing := sorted(loading["missing_keys"]):  # transformers would fill them with random numbers
        raise source.unusable_weights(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return model


def _dtype(name: str, device: torch.device) -> Any:
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if device.type == "cpu" else "auto"


def weights_fingerprint(source: ModelSource) -> str:
    """sha256 over names, dtypes, shapes and bytes of the weights as stored, whatever files they are split into."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Path] = {}
    for file in source.weight_files():
        try:
            with safe_open(file, framework="pt") as opened:
                tensors.update(dict.fromkeys(opened.keys(), file))
        except SafetensorError as error:
            raise source.unusable_weights(f"{file.name}: {error}") from None
    digest = hashlib.sha256()
    opened_files: dict[Path, Any] = {file: safe_open(file, framework="pt") for file in set(tensors.values())}
    for name in sorted(tensors):
        tensor = opened_files[tensors[name]].get_tensor(name).contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def default_device() -> torch.device:
    """The accelerator of this process, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_threads(count: int) -> None:
    """Ray sets OMP_NUM_THREADS from the CPUs a worker asks for; torch may already have read something else."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
