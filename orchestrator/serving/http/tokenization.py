"""Tokenization for clients, with vLLM's request and answer shapes."""

from __future__ import annotations

from orchestrator.models.backbone import Backbone
from orchestrator.models.placeholders import text_ids
from orchestrator.serving.http.chat import encode_chat
from orchestrator.serving.http.protocol import (
    ApiError,
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from orchestrator.serving.prompts.served_prompt import ServedPrompt


def tokenize(
    request: TokenizeRequest, backbone: Backbone, prompt: ServedPrompt | None
) -> TokenizeAnswer:
    """Return the tokens of a text or a conversation, without virtual tokens.

    ``prompt`` is the one that the request names, if any. Raises BadInput for an input that the
    prompt can't take.
    """
    ids = _ids(request, backbone, prompt)
    room = backbone.info.context_length - (prompt.virtual_tokens if prompt else 0)
    names = backbone.tokenizer.convert_ids_to_tokens(ids) if request.return_token_strs else None
    return TokenizeAnswer(count=len(ids), max_model_len=room, tokens=ids, token_strs=names)


def _ids(request: TokenizeRequest, backbone: Backbone, prompt: ServedPrompt | None) -> list[int]:
    if prompt is not None and request.messages is not None:
        return text_ids(encode_chat(prompt, request.messages, answer_tokens=0))
    text = request.prompt or ""
    if prompt is not None and request.uses_template:
        return text_ids(prompt.encode(text, answer_tokens=0))
    with_special = request.add_special_tokens is not False
    return list(backbone.tokenizer(text, add_special_tokens=with_special)["input_ids"])


def detokenize(request: DetokenizeRequest, backbone: Backbone) -> DetokenizeAnswer:
    """Return the text of token ids, special tokens included.

    Raises ApiError for an id that the tokenizer does not have.
    """
    size = len(backbone.tokenizer)
    last = max(request.tokens, default=0)
    if last >= size:
        raise ApiError(
            400,
            f"'tokens' holds {last}, and the tokenizer's last token is {size - 1}",
            "invalid_value",
            "tokens",
        )
    text = backbone.tokenizer.decode(request.tokens, clean_up_tokenization_spaces=False)
    return DetokenizeAnswer(prompt=str(text))


def tokenizer_info(backbone: Backbone) -> TokenizerInfo:
    """Describe the tokenizer: its special tokens and its chat template."""
    tokenizer = backbone.tokenizer
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        bos_token=_text_of(tokenizer, "bos_token"),
        eos_token=_text_of(tokenizer, "eos_token"),
        pad_token=_text_of(tokenizer, "pad_token"),
        chat_template=_text_of(tokenizer, "chat_template"),
        model_max_length=backbone.info.context_length,
    )


def _text_of(tokenizer: object, name: str) -> str | None:
    value = getattr(tokenizer, name, None)
    return None if value is None else str(value)
