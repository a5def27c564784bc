"""Conversations in a base model's chat template, with control text and contents kept apart.

The template is rendered with placeholders in the place of the contents. The text around them is the
template's own, in which control tokens are read; the contents are texts, in which they are not. The
contents are then rendered as well, to find out what the template changes in them. White space that
it strips at their ends is stripped everywhere. Any other change is refused, since a model would be
tuned on something else than what is served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.data.control_tokens import ControlTokens, TemplateText
from orchestrator.data.conversations import ASSISTANT, SYSTEM, USER
from orchestrator.data.template import Mark
from orchestrator.errors import BadInput
from orchestrator.job.spec import SpecialTokens

Segments = list[str | Mark]

DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro %}"
"""A fixed date for templates that write today's, so that token ids are the same on every day."""
LEAVE_OUT = "leave such rows out, or choose another base model"


@dataclass(frozen=True)
class Turn:
    """A message of a conversation; its content may have marks."""

    role: str
    content: Segments

    @classmethod
    def of(cls, message: Mapping[str, str]) -> Turn:
        return cls(message["role"], [message["content"]])

    @property
    def text(self) -> str:
        return _text(self.content)


@dataclass(frozen=True)
class _Frame:
    """The template's own text around the contents of some roles.

    ``texts`` has one more entry than ``order``, which names the turn that follows each text.
    """

    texts: tuple[TemplateText, ...]
    order: tuple[int, ...]


class ChatFormat:
    """A tokenizer's chat template, with the system message of conversations that have none."""

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        rule: SpecialTokens = "text",
        column: str | None = None,
    ) -> None:
        """Find out what the template writes around an answer.

        ``column`` is where the rows that prompts are tuned on have their conversations; None if
        rows are texts. Raises BadInput for a tokenizer without a chat template, and for a template
        that does not show a system message, the user's message or the answer as it is.
        """
        if not has_chat_template(tokenizer):
            key = "data.chat" if column is None else "data.messages"
            raise BadInput(
                f"{key}: the base model has no chat template",
                f"leave {key} out, or choose a base model with a chat template (often named "
                "-Instruct or -Chat)",
            )
        self._tokenizer = tokenizer
        self._source = str(tokenizer.get_chat_template())
        self.system = system
        self.column = column
        self.strips = 0
        """How often the template stripped white space from a text."""
        self.control = ControlTokens(tokenizer, rule, self._source)
        self._frames: dict[tuple[str, ...], _Frame] = {}
        self._answers: dict[str, str] = {}
        if system is not None:
            self._check_system(system)
        self._opening, closing = self._around_answer()
        self.end_id = self.control.first_in(closing)
        """Id of the token that ends the assistant's turn; None if the template writes none."""

    @property
    def digest(self) -> str:
        """The sha256 of the template."""
        return hashlib.sha256(self._source.encode()).hexdigest()

    @property
    def tail(self) -> TemplateText:
        """The template's text between the user's message and the answer."""
        frame = self._frame((USER,))
        return TemplateText(frame.texts[-1] + self._opening_text)

    @property
    def _opening_text(self) -> str:
        """The text that opens an answer, such as an empty thinking block; "" for white space."""
        return "" if self._opening.isspace() else self._opening

    def segments(self, turns: Sequence[Turn], *, check: bool = True) -> Segments:
        """Return a conversation up to the assistant's answer, as texts and marks.

        With ``check``, refuses contents that the template changes. Raises BadInput that names the
        turn.
        """
        if self.system is not None and turns[0].role != SYSTEM:
            turns = [Turn(SYSTEM, [self.system]), *turns]
        frame = self._frame(tuple(turn.role for turn in turns))
        contents = [turn.content for turn in turns]
        if check:
            rendered = self._shown(frame, turns)
            self.strips += rendered != [turn.text for turn in turns]
            contents = [
                stripped(content, text) for content, text in zip(contents, rendered, strict=True)
            ]
        segments: Segments = [frame.texts[0]]
        for turn_index, text in zip(frame.order, frame.texts[1:], strict=True):
            segments += [*contents[turn_index], text]
        return [*segments, TemplateText(self._opening_text)]

    def answer(self, text: str) -> str:
        """Return an answer as the template writes it, with white space that it opens with.

        Raises BadInput if the template changes the answer.
        """
        if text not in self._answers:
            turns = [Turn(USER, ["a"]), Turn(ASSISTANT, [text])]
            frame = self._frame((USER, ASSISTANT), answered=True)
            rendered = self._shown(frame, turns, answered=True)[1]
            self._answers[text] = rendered
        rendered = self._answers[text]
        self.strips += rendered != text
        return self._opening + rendered if self._opening.isspace() else rendered

    def _check_system(self, system: str) -> None:
        try:
            turns = [Turn(SYSTEM, [system]), Turn(USER, ["a"])]
            self._shown(self._frame((SYSTEM, USER)), turns)
        except BadInput as error:
            raise BadInput(
                f"data.chat.system: {error.message}",
                "leave it out, and write the instruction into data.template",
            ) from None

    def _around_answer(self) -> tuple[str, str]:
        """Return what the template writes in front of an answer and behind it.

        The first is what it adds to the text that asks for an answer.
        """
        question_frame = self._frame((USER,))
        answered_frame = self._frame((USER, ASSISTANT), answered=True)
        before, behind = answered_frame.texts[1], answered_frame.texts[2]
        question_end = question_frame.texts[-1]
        opening = before[len(question_end) :] if before.startswith(question_end) else ""
        return str(opening), str(behind)

    def _frame(self, roles: tuple[str, ...], answered: bool = False) -> _Frame:
        """Return the template's text around messages of these roles.

        ``answered`` conversations end with the answer; others ask for one.
        """
        key = (*roles, "") if answered else roles
        if key not in self._frames:
            self._frames[key] = self._made_frame(roles, answered)
        return self._frames[key]

    def _made_frame(self, roles: tuple[str, ...], answered: bool) -> _Frame:
        placeholders = [f"@{turn_index}@{self.digest[:24]}@" for turn_index in range(len(roles))]
        text = self._rendered(roles, placeholders, answered)
        for turn_index, placeholder in enumerate(placeholders):
            if (times := text.count(placeholder)) != 1:
                how = "does not show" if not times else "shows more than once"
                raise BadInput(
                    f"the base model's chat template {how} turn {turn_index + 1} "
                    f"({roles[turn_index]})",
                    LEAVE_OUT,
                )
        order = sorted(
            range(len(roles)), key=lambda turn_index: text.index(placeholders[turn_index])
        )
        texts = []
        for turn_index in order:
            before, _, text = text.partition(placeholders[turn_index])
            texts.append(TemplateText(before))
        return _Frame((*texts, TemplateText(text)), tuple(order))

    def _rendered(self, roles: Sequence[str], contents: Sequence[str], answered: bool) -> str:
        messages = [
            {"role": role, "content": content}
            for role, content in zip(roles, contents, strict=True)
        ]
        source = DATE + self._source if "strftime_now" in self._source else self._source
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=not answered,
                )
            )
        except Exception as error:
            # A template may raise any error; the message says which messages it does not accept.
            raise BadInput(
                f"the base model's chat template refuses the turns {', '.join(roles)}: "
                f"{str(error)[:200]}",
                LEAVE_OUT,
            ) from None

    def _shown(self, frame: _Frame, turns: Sequence[Turn], answered: bool = False) -> list[str]:
        """Return each turn's text as the template shows it, without white space that it strips.

        Raises BadInput for any other change.
        """
        texts = [turn.text for turn in turns]
        conversation = self._rendered([turn.role for turn in turns], texts, answered)
        rendered = list(texts)
        position = 0
        for number, turn_index in enumerate(frame.order):
            position += len(frame.texts[number])
            behind = frame.texts[number + 1]
            text = texts[turn_index]
            choices = [text, text.strip(), text.rstrip(), text.lstrip()]
            variants = [
                variant
                for variant in choices
                if conversation.startswith(variant + behind, position)
            ]
            is_last = number + 1 == len(frame.order)
            if is_last:
                variants = [
                    variant
                    for variant in variants
                    if position + len(variant + behind) == len(conversation)
                ]
            if not variants or not conversation.startswith(frame.texts[0]):
                raise BadInput(
                    f"the base model's chat template changes turn {turn_index + 1} "
                    f"({turns[turn_index].role}), {text[:60]!r}",
                    LEAVE_OUT,
                )
            rendered[turn_index] = variants[0]
            position += len(variants[0])
        return rendered


def has_chat_template(tokenizer: Any) -> bool:
    """Tell whether a tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def stripped(content: Segments, shown: str) -> Segments:
    """Return a content without the white space at its ends that ``shown`` lacks."""
    text = _text(content)
    if text == shown:
        return content
    start = text.find(shown) if shown else len(text)
    front, back = start, len(text) - start - len(shown)
    return _without(_without(content, front)[::-1], back, from_end=True)[::-1]


def _without(content: Segments, count: int, from_end: bool = False) -> Segments:
    """Drop ``count`` characters from the first texts of a content."""
    segments: Segments = []
    for segment in content:
        if isinstance(segment, Mark) or not count:
            segments.append(segment)
            continue
        dropped = min(count, len(segment))
        count -= dropped
        rest = segment[: len(segment) - dropped] if from_end else segment[dropped:]
        segments.append(TemplateText(rest) if isinstance(segment, TemplateText) else rest)
    return segments


def _text(content: Segments) -> str:
    return "".join(segment for segment in content if isinstance(segment, str))
