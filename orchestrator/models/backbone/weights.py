"""Checks of a base model's weights: shapes against its configuration, and finite values.

The driver checks the files before Ray starts (``check_files``). Some faults it can't see there: in
a model from the hub, in large weights, or in tensors whose names transformers converts. The worker
finds these as it loads the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orchestrator.errors import BadInput
from orchestrator.models.builtin import cache_folder
from orchestrator.models.source import Family, ModelSource, family_of, quiet_transformers
from orchestrator.utils.garbage import uncollected
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

READ_AT_MOST = 2 << 30
"""Size in bytes up to which the driver checks the weights' values.

Larger weights are checked by the worker, which reads them anyway.
"""

CHECKS = 1
"""Version of the checks: files that passed older ones are looked at again."""

_LAYER = re.compile(r"\.\d+\.")

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Stored:
    """A tensor in a weights file."""

    file: Path
    shape: tuple[int, ...]


def auto_model(family: Family) -> type[_BaseAutoModelClass]:
    """Return the transformers class that builds models of the family."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    classes: dict[Family, type[_BaseAutoModelClass]] = {
        "causal": AutoModelForCausalLM,
        "seq2seq": AutoModelForSeq2SeqLM,
        "masked": AutoModelForMaskedLM,
    }
    return classes[family]


def check_files(source: ModelSource) -> None:
    """Check the stored weights' shapes against the configuration, and their values.

    Raises BadInput for weights of other shapes or with values that are not finite. Values are read
    in weights of up to READ_AT_MOST bytes. A model that brings its own code or is stored quantised
    is left to the worker. Files that passed are not read again until they change: building the
    model takes a second, mostly to import its code.
    """
    mark = _mark_of(source)
    if mark.is_file():
        return
    _check_files(source)
    with suppress(OSError):  # a cache that can't be written to only costs time
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()


def _mark_of(source: ModelSource) -> Path:
    """Return the file that is there once these very files have passed."""
    import transformers

    files = [source.path / "config.json", *source.weight_files()]
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    text = repr([CHECKS, READ_AT_MOST, transformers.__version__, states])
    return cache_folder() / "checked-weights" / hashlib.sha256(text.encode()).hexdigest()[:24]


def _check_files(source: ModelSource) -> None:
    stored = stored_tensors(source)
    if source.brings_model_code or getattr(source.config, "quantization_config", None) is not None:
        return
    model = empty_model(source)
    names = _names_in_model(model, stored)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    wrong = {
        name: (stored[name].shape, expected[inside])
        for name, inside in names.items()
        if stored[name].shape != expected[inside]
    }
    if wrong:
        raise wrong_shapes(source, wrong)
    check_layers(source, model, set(stored) - set(names), set(expected) - set(names.values()))
    if sum(file.stat().st_size for file in source.weight_files()) <= READ_AT_MOST:
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        check_finite(
            source,
            _values(stored, [name for name, inside in names.items() if inside in parameters]),
        )


def stored_tensors(source: ModelSource) -> dict[str, Stored]:
    """Read the headers of the model's weight files.

    Raises BadInput for a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, Stored] = {}
    for file in source.weight_files():
        try:
            with safe_open(file, framework="pt") as opened:
                for name in list(opened.keys()):
                    tensors[name] = Stored(file, tuple(opened.get_slice(name).get_shape()))
        except SafetensorError as error:
            raise source.unusable_weights(f"{file.name}: {error}") from None
    return tensors


def empty_model(source: ModelSource) -> PreTrainedModel:
    """Build the configuration's model without memory for its weights.

    Raises BadInput if the model can't be built.
    """
    quiet_transformers()
    config = source.config
    try:
        with uncollected(), torch.device("meta"):
            return auto_model(family_of(config)).from_config(config)
    # Models check their configurations in their own ways: AssertionError, KeyError, and others.
    except Exception as error:
        raise unusable_config(source, error) from None


def unusable_config(source: ModelSource, error: Exception) -> BadInput:
    """Make the error for a configuration from which no model can be built."""
    text = getattr(source.config, "get_text_config", lambda: source.config)()
    pad = getattr(text, "pad_token_id", None)
    if isinstance(pad, int) and pad >= source.table_size:
        return BadInput(
            f"base_model.id {source.id!r}: config.json has pad_token_id {pad}, and the embedding "
            f"table has {source.table_size} rows, ids 0 to {source.table_size - 1}",
            "set pad_token_id to an id of the table, or to null: padding needs no embedding of its "
            "own",
        )
    return BadInput(
        f"base_model.id {source.id!r}: no model can be built from its config.json: "
        f"{first_line(error)}",
        "correct config.json, or fetch the model again",
    )


def _names_in_model(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Map each stored name to the model's name of the same tensor.

    The two may differ by the base model's prefix. Tensors that transformers converts as it reads
    them are left out.
    """
    model_names = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    converted = _conversions(model)
    names = {}
    for name in stored:
        if any(pattern.search(name) for pattern in converted):
            continue
        candidates = (name, prefix + name, name.removeprefix(prefix))
        model_name = next((candidate for candidate in candidates if candidate in model_names), None)
        if model_name is not None:
            names[name] = model_name
    return names


def _conversions(model: PreTrainedModel) -> list[re.Pattern[str]]:
    """Return the patterns of names that transformers changes, or whose tensors it changes."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:  # before transformers 5 nothing was converted
        return []
    mapping = get_model_conversion_mapping(model)
    return [re.compile(pattern) for change in mapping for pattern in change.source_patterns]


def wrong_shapes(
    source: ModelSource, wrong: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> BadInput:
    """Make the error for tensors whose stored shape differs from the configuration's."""
    name, (stored_shape, config_shape) = next(iter(wrong.items()))
    more = f", and {len(wrong) - 1} more tensors differ" if len(wrong) > 1 else ""
    return BadInput(
        f"base_model.id {source.id!r}: config.json disagrees with the weights: {name} is "
        f"{list(stored_shape)} in the file and {list(config_shape)} by config.json{more}",
        "put the config.json beside the weights that they were saved with, or fetch the model "
        "again",
    )


def check_layers(
    source: ModelSource, model: PreTrainedModel, unexpected: Iterable[str], missing: Iterable[str]
) -> None:
    """Refuse weights that have more or fewer layers than the configuration.

    transformers silently drops surplus layers. A surplus tensor belongs to a layer if the model has
    the same tensor in its first layer. Other surplus tensors, of another head or of older versions,
    do no harm. Raises BadInput.
    """
    model_names = set(model.state_dict())
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    unexplained = [
        name for name in unexpected if not any(pattern.search(name) for pattern in ignored)
    ]
    for name in sorted(unexplained):
        if _in_first_layer(name) in model_names:
            raise _layers_differ(source, name, "is in the files, and config.json has fewer layers")
    absent = set(missing)
    for name in sorted(absent):
        in_first_layer = _in_first_layer(name)
        if in_first_layer in model_names and in_first_layer not in absent:
            raise _layers_differ(
                source, name, "is not in the files, and config.json has as many layers"
            )


def _in_first_layer(name: str) -> str:
    """Return the name of the same tensor in the first layer, or "" outside of layers."""
    first = _LAYER.sub(".0.", name, count=1)
    return "" if first == name else first


def _layers_differ(source: ModelSource, name: str, problem: str) -> BadInput:
    return BadInput(
        f"base_model.id {source.id!r}: config.json disagrees with the weights: {name} {problem}",
        "put the config.json beside the weights that they were saved with, or fetch the model "
        "again",
    )


def _values(stored: Mapping[str, Stored], names: Iterable[str]) -> Iterable[tuple[str, Tensor]]:
    from safetensors import safe_open

    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(stored[name].file, []).append(name)
    for file, names_in_file in by_file.items():
        with safe_open(file, framework="pt") as opened:
            for name in names_in_file:
                yield name, opened.get_tensor(name)


def check_finite(
    source: ModelSource, tensors: Iterable[tuple[str, Tensor]], dtype: str = ""
) -> None:
    """Raise BadInput if a tensor holds NaN or an infinite number.

    ``dtype`` appears in the error and names the dtype that the weights were cast to, if any.
    """
    for name, tensor in tensors:
        if not is_finite(tensor):
            count = int((~tensor.isfinite()).sum())
            cast = f" in {dtype}" if dtype else ""
            raise BadInput(
                f"base_model.id {source.id!r}: the weights are not finite{cast}: {count} of the "
                f"{tensor.numel()} numbers of {name} are NaN or infinite",
                "fetch the model again, or choose another: one that diverged as it was trained "
                "can't be used",
            )


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite.

    Tensors outside the usual floating-point dtypes count as finite.
    """
    if tensor.dtype not in FLOATS or not tensor.numel():
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def check_loaded(source: ModelSource, model: nn.Module) -> None:
    """Refuse a loaded model whose weights are not finite.

    Weights may overflow in a smaller dtype, for example. Raises BadInput.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    check_finite(source, model.named_parameters(), dtype)
