"""The type of tokenizers, held against tokenizers of transformers."""

from __future__ import annotations

import inspect

import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, PythonBackend

from orchestrator.models.tokenizer import Tokenizer

OVERLOADED = ("convert_ids_to_tokens",)  # has no signature at run time


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, PythonBackend])
def test_tokenizers_of_transformers_have_all_that_the_type_names(
    kind: type[PreTrainedTokenizerBase],
) -> None:
    """Fast and slow tokenizers have each method of the type, with its parameters."""
    methods = {
        name: method
        for name, method in inspect.getmembers(Tokenizer, inspect.isfunction)
        if name in ("__call__", "__len__") or not name.startswith("_")
    }
    assert {"__call__", "decode", "get_vocab", "save_pretrained"} <= set(methods)
    for name, method in methods.items():
        theirs = set(inspect.signature(getattr(kind, name)).parameters)
        if "kwargs" not in theirs and name not in OVERLOADED:
            assert set(inspect.signature(method).parameters) <= theirs, name
