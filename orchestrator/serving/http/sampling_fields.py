"""The fields of a request body that choose its tokens, named as by OpenAI and vLLM."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, Field
from pydantic_core import PydanticCustomError

MAX_INT = 2**63 - 1
MAX_CHOICES = 128  # OpenAI's
MAX_BIASES = 1024
MAX_STOP_TOKENS = 128

TokenId: TypeAlias = Annotated[int, Field(ge=0, le=MAX_INT)]
TokenIds: TypeAlias = Annotated[list[TokenId], Field(fail_fast=True)]
BiasedToken: TypeAlias = Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,17})$")]
"""A token id as a key of a JSON object."""
Penalty: TypeAlias = Annotated[float, Field(ge=-2, le=2)]


class SamplingFields(BaseModel):
    """The fields beyond temperature, top_p, stop and seed; null leaves a field out."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    """How many answers to give; each has its own random numbers."""
    presence_penalty: Penalty | None = None
    """Lowers the logit of every token that the answer already has."""
    frequency_penalty: Penalty | None = None
    """Lowers a token's logit for each time that the answer already has it."""
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    """Above 1, makes the tokens of the input and of the answer less likely."""
    logit_bias: (
        Annotated[
            dict[BiasedToken, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_BIASES),
        ]
        | None
    ) = None
    """What to add to the logits of token ids."""
    top_k: Annotated[int, Field(ge=-1, le=MAX_INT)] | None = None
    """Draw from this many of the likeliest tokens; 0 and -1 draw from all."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Draw from tokens that are at least this share as likely as the likeliest one."""
    ignore_eos: bool | None = None
    """Go on after the end token."""
    min_tokens: Annotated[int, Field(ge=0, le=MAX_INT)] | None = None
    """Give at least this many tokens before the end token or a stop ends the answer."""
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKENS)] | None = None
    """Token ids that end the answer."""
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Return the log-probabilities of the input's tokens, with this many of the likeliest ones."""


def value_error(field: str, message: str) -> PydanticCustomError:
    """Build the error of a field whose value does not fit; the message follows the field's name."""
    context = {"field": field, "quoted": repr(field), "message": message}
    return PydanticCustomError("value", "{quoted} {message}", context)
