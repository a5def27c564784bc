"""The inputs of a completion request: their token ids, and what an answer says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.models.tokenizer import Tokenizer
from orchestrator.serving.engine.detokenize import RowText
from orchestrator.serving.engine.input_scores import ScoredToken
from orchestrator.serving.http.protocol import ApiError, Logprobs, PromptLogprob, PromptLogprobs
from orchestrator.serving.prompts.served_prompt import ServedPrompt


@dataclass(frozen=True)
class EncodedInput:
    """The token ids of an input, and its text if the answer begins with it."""

    ids: list[int]
    echo: str | None = None


@dataclass(frozen=True)
class InputReport:
    """What an answer says about its input; nothing by default."""

    echo: str = ""
    """The input's text, in front of the answer's."""
    logprobs: Logprobs | None = None
    """The log-probabilities of the echoed tokens."""
    prompt_logprobs: PromptLogprobs | None = None


NO_REPORT = InputReport()


def encode_inputs(
    prompt: ServedPrompt,
    inputs: Sequence[str | list[int]],
    answer_tokens: int,
    echo: bool,
    vocabulary: int,
) -> list[EncodedInput]:
    """Encode texts, which fill the prompt's template, and token ids, which are taken as they are.

    ``vocabulary`` is the number of the model's tokens. Raises ApiError for ids that the model does
    not have and for inputs that can't be echoed, and BadInput as ``ServedPrompt.encode``.
    """
    encoded = []
    for entry in inputs:
        if isinstance(entry, str):
            ids = prompt.encode(entry, answer_tokens)
            if echo:
                _check_echo(prompt, entry, ids)
            encoded.append(EncodedInput(ids, entry if echo else None))
        else:
            _check_ids(prompt, entry, vocabulary)
            prompt.check_room(len(entry), answer_tokens)
            text = _decoded(prompt.encoder.tokenizer, entry) if echo else None
            encoded.append(EncodedInput(list(entry), text))
    return encoded


def _check_ids(prompt: ServedPrompt, ids: Sequence[int], vocabulary: int) -> None:
    if prompt.encoder.template.places_virtual_tokens:
        raise ApiError(
            400,
            f"The template of {prompt.id!r} places virtual tokens inside the text, which token ids "
            "can't say; send the text",
            "unsupported_operation",
            "prompt",
        )
    if max(ids) >= vocabulary:
        raise ApiError(
            400,
            f"'prompt' holds token {max(ids)}, and the model's last one is {vocabulary - 1}",
            "invalid_value",
            "prompt",
        )


def _check_echo(prompt: ServedPrompt, text: str, ids: Sequence[int]) -> None:
    """Refuse to echo a text that is not what the model reads.

    The log-probabilities would be those of other tokens than the client expects.
    """
    encoder = prompt.encoder
    is_bare = encoder.chat is None and encoder.template.text == f"{{{encoder.template.columns[0]}}}"
    if not is_bare:
        raise _no_echo(f"the template of {prompt.id!r} adds text to the input")
    if len(ids) >= encoder.max_input_tokens and len(ids) < len(
        encoder.row_ids(encoder.template.row(text))
    ):
        raise _no_echo(f"{prompt.id!r} cuts an input after {encoder.max_input_tokens} tokens")


def _no_echo(reason: str) -> ApiError:
    message = f"'echo' can't return what the model reads, because {reason}; send token ids, which "
    return ApiError(
        400, f"{message}POST /tokenize with apply_template returns", "unsupported_operation", "echo"
    )


def echoed_logprobs(
    tokenizer: Tokenizer, scores: Sequence[ScoredToken], count: int
) -> Logprobs | None:
    """Return the log-probabilities of an echoed input, with ``count`` of the likeliest tokens."""
    if not scores:
        return None
    text = RowText(tokenizer, [])
    offsets, pieces, tops = [], [], []
    for entry in scores:
        offsets.append(len(text.text))
        text.add(entry.token)
        piece = token_text(tokenizer, entry.token)
        pieces.append(piece)
        tops.append(_top(tokenizer, entry, piece, count))
    return Logprobs(
        tokens=pieces,
        token_logprobs=[entry.logprob for entry in scores],
        top_logprobs=tops,
        text_offset=offsets,
    )


def _top(
    tokenizer: Tokenizer, entry: ScoredToken, piece: str, count: int
) -> dict[str, float] | None:
    if entry.logprob is None:
        return None
    likeliest = [(token_text(tokenizer, token), value) for token, value in entry.likeliest[:count]]
    # Of tokens with equal text, the likeliest stays.
    return dict(reversed([*likeliest, (piece, entry.logprob)]))


def prompt_logprobs(
    tokenizer: Tokenizer, scores: Sequence[ScoredToken], count: int
) -> PromptLogprobs:
    """Return the log-probabilities of an input's tokens in vLLM's shape."""
    return [_position(tokenizer, entry, count) for entry in scores]


def _position(
    tokenizer: Tokenizer, entry: ScoredToken, count: int
) -> dict[str, PromptLogprob] | None:
    if entry.logprob is None or entry.rank is None:
        return None
    ranked = enumerate(entry.likeliest[:count], start=1)
    facts = {entry.token: (entry.logprob, entry.rank)}
    facts |= {token: (value, rank) for rank, (token, value) in ranked if token != entry.token}
    return {
        str(token): PromptLogprob(
            logprob=value, rank=rank, decoded_token=token_text(tokenizer, token)
        )
        for token, (value, rank) in facts.items()
    }


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of one token alone."""
    return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
