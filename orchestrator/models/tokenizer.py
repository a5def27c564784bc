"""The part of a transformers tokenizer that this project uses, as a type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import NotRequired, Protocol, TypedDict, overload


class TokenIds(TypedDict):
    """A tokenised text."""

    input_ids: list[int]
    offset_mapping: NotRequired[list[tuple[int, int]]]
    """The characters that each token stands for, from and to; fast tokenizers give it on demand."""


class Tokenizer(Protocol):
    """A tokenizer of transformers (``PreTrainedTokenizerBase``).

    ``ModelSource.tokenizer`` makes sure that it has the special token that its family needs.
    """

    all_special_ids: list[int]
    eos_token_id: int
    mask_token_id: int

    def __len__(self) -> int: ...

    def __call__(
        self,
        text: str | None = None,
        *,
        text_target: str | None = None,
        add_special_tokens: bool = True,
        return_offsets_mapping: bool = False,
    ) -> TokenIds: ...

    def decode(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str: ...

    @overload
    def convert_ids_to_tokens(self, ids: int) -> str: ...

    @overload
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, str]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
    ) -> str: ...

    def save_pretrained(self, save_directory: str | PathLike[str]) -> tuple[str, ...]: ...
