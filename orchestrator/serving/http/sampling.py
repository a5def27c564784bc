"""Conversion of a request's fields to the engine's rule for the next tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from orchestrator.serving.engine.generation import Sampling
from orchestrator.serving.engine.logit_rules import LogitRules
from orchestrator.serving.http.protocol import ApiError, GenerationRequest

DEFAULT_MAX_TOKENS = 16  # OpenAI's
DEFAULT_TEMPERATURE = 1.0  # OpenAI's


def sampling_of(
    request: GenerationRequest, max_tokens: int | None, logprobs: int | None, vocabulary: int
) -> Sampling:
    """Build the rule of a request. Raises ApiError for values that do not fit the model.

    ``vocabulary`` is the number of the model's tokens.
    """
    max_tokens = DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise _wrong(
            "min_tokens", f"is {min_tokens}, and at most {max_tokens} tokens are asked for"
        )
    bias = {int(token): value for token, value in (request.logit_bias or {}).items()}
    stop_token_ids = frozenset(request.stop_token_ids or ())
    _check_tokens("logit_bias", bias, vocabulary)
    _check_tokens("stop_token_ids", stop_token_ids, vocabulary)
    return Sampling(
        max_tokens=max_tokens,
        temperature=DEFAULT_TEMPERATURE if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        stop=request.stops,
        seed=request.seed,
        logprobs=logprobs,
        rules=_rules(request, bias),
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        ignore_eos=bool(request.ignore_eos),
        min_tokens=min_tokens,
        stop_token_ids=stop_token_ids,
        prompt_logprobs=request.prompt_logprobs,
    )


def choices_of(sampling: Sampling, inputs: int, count: int) -> list[Sampling]:
    """Return the rule of each of ``count`` answers to each of the inputs, in the answers' order.

    With a seed, the answers to an input have different seeds, of which the first is the request's.
    """
    if sampling.seed is None:
        return [sampling] * (inputs * count)
    choices = [replace(sampling, seed=sampling.seed + choice) for choice in range(count)]
    return choices * inputs


def _rules(request: GenerationRequest, bias: dict[int, float]) -> LogitRules:
    return LogitRules(
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        bias=tuple((token, value) for token, value in bias.items() if value),
    )


def _check_tokens(field: str, tokens: Iterable[int], vocabulary: int) -> None:
    beyond = [token for token in tokens if token >= vocabulary]
    if beyond:
        raise _wrong(
            field, f"names token {beyond[0]}, and the model's last one is {vocabulary - 1}"
        )


def _wrong(field: str, message: str) -> ApiError:
    return ApiError(400, f"{field!r} {message}", "invalid_value", field)
