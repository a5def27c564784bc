"""Checks of a base model's configuration for faults that would surface later in a worker.

They find configurations that would make a worker fail, or give wrong results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.errors import BadInput
from orchestrator.models.rope import rope_switches
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.text import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

RESIZE = (
    "leave the token out, or give the model an embedding for it: "
    "model.resize_token_embeddings(len(tokenizer)), then model.save_pretrained(FOLDER)"
)


def check_stored_quantization(model_id: str, config: PreTrainedConfig, requested: str) -> None:
    """Raise BadInput for a model stored quantised that the installed libraries can't read.

    ``requested`` is base_model.quantization. It has to be "none", because the setting has no
    meaning for a model that is quantised already.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return
    document = dict(stored) if isinstance(stored, dict) else stored.to_dict()
    method = _quantization_method(document)
    about = f"base_model.id {model_id!r}: its weights are quantised by {method}"
    if requested != "none":
        raise BadInput(
            f"{about} already, and base_model.quantization is {requested}",
            "leave base_model.quantization out, or choose the model's unquantised version",
        )
    if reason := _why_unreadable(document):
        raise BadInput(
            f"{about}, which can't be read here: {reason}",
            f"install a library that reads {method} on every machine of the search, or choose the "
            "model's unquantised version (base_model.quantization rounds it as it is loaded)",
        )


def _quantization_method(document: JsonObject) -> str:
    method = document.get("quant_method")
    if method is None and (document.get("load_in_8bit") or document.get("load_in_4bit")):
        return "bitsandbytes"  # early bitsandbytes models don't name their method
    return str(getattr(method, "value", method or "an unnamed method"))


def _why_unreadable(document: JsonObject) -> str:
    """Return why transformers can't read weights that are quantised this way, or ""."""
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        quantizer = AutoHfQuantizer.from_config(document, pre_quantized=True)
    # The method is unknown, a library is missing, or a library refuses the configuration.
    except Exception as error:
        return first_line(error)
    try:
        quantizer.validate_environment(device_map=None)
    except ImportError as error:
        return first_line(error)
    except Exception:  # this machine has no accelerator, but the workers may have one
        return ""
    return ""


def check_positions(
    model_id: str, config: PreTrainedConfig, family: str, context: int, own_code: bool
) -> None:
    """Raise BadInput if position factors follow a batch's longest row and can't be set per row.

    Rows get factors of their own only in causal models that transformers implements.
    """
    if not rope_switches(config, context) or (family == "causal" and not own_code):
        return
    about = (
        f"base_model.id {model_id!r} scales its positions by the longest row of a batch (LongRoPE)"
    )
    if own_code:
        raise BadInput(
            f"{about} in code of its own, so that a row's result would depend on the rows beside "
            "it",
            "set base_model.allow_remote_code: false if transformers knows the model, or choose "
            "another model",
        )
    raise BadInput(
        f"{about}, so that a row's result would depend on the rows beside it: rows have factors of "
        f"their own only in causal models, and this is a {family} model",
        "choose another model",
    )


def check_config_tokens(model_id: str, config: PreTrainedConfig, family: str, folder: Path) -> None:
    """Raise BadInput if an encoder-decoder's start token is missing or beyond the table."""
    if family != "seq2seq":
        return
    start = decoder_start(config, folder)
    if start is None:
        raise BadInput(
            f"base_model.id {model_id!r}: config.json names no token that the decoder starts from",
            "set decoder_start_token_id in the model's config.json",
        )
    size = config.get_text_config().vocab_size
    if start >= size:
        raise BadInput(
            f"base_model.id {model_id!r}: the decoder starts from token id {start}, and the "
            f"embedding table has {size} rows, ids 0 to {size - 1}",
            "correct decoder_start_token_id in the model's config.json",
        )


def decoder_start(config: PreTrainedConfig, folder: Path) -> int | None:
    """Return the id of the token that a decoder starts from, by the backbone's rules."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None and (generation := folder / "generation_config.json").is_file():
        start = json.loads(generation.read_text(encoding="utf-8")).get("decoder_start_token_id")
    return getattr(config, "pad_token_id", None) if start is None else start


def beyond_table(token: str, token_id: int, size: int, holder: str) -> BadInput:
    """Make the error for a token that the model has no embedding for.

    ``holder`` says where the token comes from.
    """
    return BadInput(
        f"{holder} holds token {token!r}, id {token_id}, and the base model's embedding table has "
        f"{size} rows, ids 0 to {size - 1}",
        RESIZE,
    )
