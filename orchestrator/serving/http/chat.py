"""Encoding of conversations with two templates.

The base model's chat template formats the conversation; the served prompt's own template formats
the last message in it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from orchestrator.data.template import Mark
from orchestrator.errors import BadInput
from orchestrator.models.placeholders import text_ids
from orchestrator.models.tokenizer import Tokenizer
from orchestrator.serving.http.protocol import ChatMessage
from orchestrator.serving.prompts.served_prompt import ServedPrompt


class NoChatTemplate(BadInput):
    """The base model has no chat template, and the conversation has more than one message."""


def encode_chat(
    prompt: ServedPrompt, messages: Sequence[ChatMessage], answer_tokens: int
) -> list[int]:
    """Encode a conversation that ends with the user's message, up to the assistant's answer.

    The last message fills the prompt's own template, in the same way as the text of a completion.
    The result, including virtual tokens, takes the message's place in the conversation. No message
    is cut. If the base model has no chat template, a single user message is encoded like the text
    of a completion. Raises BadInput for a conversation that can't be rendered or does not fit.
    """
    if messages[-1].role != "user":
        raise BadInput("the last of the messages has to be the user's")
    tokenizer = prompt.encoder.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        if len(messages) > 1:
            raise NoChatTemplate(
                f"The base model {prompt.manifest.base_model.id!r} has no chat template: "
                "send one message of the user, or use /v1/completions"
            )
        return prompt.encode(messages[0].text, answer_tokens)
    before, after = _rendered(tokenizer, messages)
    encoder = prompt.encoder
    inner = encoder.input_segments(encoder.template.row(messages[-1].text))
    ids = encoder.segment_ids(_merged([before, *inner, after]))
    prompt.check_room(len(text_ids(ids)), answer_tokens)
    return ids


def _rendered(tokenizer: Tokenizer, messages: Sequence[ChatMessage]) -> tuple[str, str]:
    """Render the conversation; return its text before and after the last message."""
    place = f"<{uuid.uuid4().hex}>"
    last = len(messages) - 1
    plain = [
        {
            "role": "system" if it.role == "developer" else it.role,
            "content": place if number == last else it.text,
        }
        for number, it in enumerate(messages)
    ]
    try:
        text = str(tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True))
    except Exception as error:
        # A template may raise any error; the message says which messages it does not accept.
        raise BadInput(
            f"the base model's chat template refuses these messages: {str(error)[:200]}"
        ) from None
    before, found, after = text.partition(place)
    if not found or place in after:
        raise BadInput("the base model's chat template does not show the last message as it is")
    return before, after


def _merged(segments: Sequence[str | Mark]) -> list[str | Mark]:
    """Join adjacent texts, because a token may span the boundary between them."""
    merged: list[str | Mark] = []
    for segment in segments:
        if isinstance(segment, str) and merged and isinstance(merged[-1], str):
            merged[-1] += segment
        else:
            merged.append(segment)
    return merged
