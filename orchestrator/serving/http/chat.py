"""Encoding of the messages of a chat request."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.data.chat import has_chat_template
from orchestrator.data.conversations import SYSTEM
from orchestrator.errors import BadInput
from orchestrator.serving.http.protocol import ChatMessage
from orchestrator.serving.prompts.served_prompt import ServedPrompt


class NoChatTemplate(BadInput):
    """The base model has no chat template, and the conversation has more than one message."""


def encode_chat(
    prompt: ServedPrompt, messages: Sequence[ChatMessage], answer_tokens: int
) -> list[int]:
    """Encode a conversation that ends with the user's message, up to the assistant's answer.

    The last message fills the prompt's own template. A prompt that was tuned in the base model's
    chat template is served in it. Any other prompt answers a single message without it, as it was
    tuned; several messages can't be told apart without it. Raises BadInput for a conversation that
    can't be rendered or does not fit.
    """
    if messages[-1].role != "user":
        raise BadInput("the last message must have role 'user'")
    if len(messages) > 1 and not has_chat_template(prompt.encoder.tokenizer):
        raise NoChatTemplate(
            f"The base model {prompt.manifest.base_model.id!r} has no chat template: "
            "send one message of the user, or use /v1/completions"
        )
    plain = [
        {"role": SYSTEM if message.role == "developer" else message.role, "content": message.text}
        for message in messages
    ]
    return prompt.encode_messages(plain, answer_tokens)
