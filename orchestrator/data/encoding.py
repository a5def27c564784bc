"""The encoding of rows as token ids: input and target, each within its token limit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from orchestrator.data.chat import ChatFormat, Turn
from orchestrator.data.control_tokens import ControlTokens, TemplateText, parts_of
from orchestrator.data.conversations import USER, Message, is_conversation, read_input
from orchestrator.data.dataset import SPLITS, RowSplits
from orchestrator.data.source_row import Row, at_row, place_of
from orchestrator.data.template import Mark, Template, Verbalizer, continuation_ids, target_text
from orchestrator.errors import BadInput
from orchestrator.job.spec import BARE_TEMPLATE, PROMPT, DataSpec, SpecialTokens
from orchestrator.models.checks import beyond_table
from orchestrator.models.placeholders import BLANK, marker
from orchestrator.models.source import Family
from orchestrator.models.tokenizer import Tokenizer

SENTINEL = "<extra_id_0>"


@dataclass(frozen=True)
class Encoded:
    """A tokenised split."""

    inputs: list[list[int]]
    """Token ids of each row's input."""
    targets: list[list[int]]
    """Token ids of each row's target, end token included."""
    labels: list[int]
    """Index of each row's label in the verbalizer; -1 without a verbalizer."""
    references: list[list[str]] = field(default_factory=list)
    """For each row, the stripped texts that a generated text is compared with.

    Empty if no texts will be generated."""

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def lengths(self) -> list[int]:
        """Number of tokens of each row, input and target together."""
        return [
            len(ids) + len(target) for ids, target in zip(self.inputs, self.targets, strict=True)
        ]


class Encoder:
    """The template, verbalizer and tokenizer of a job, the same for training and serving."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        verbalizer: Verbalizer | None,
        max_input_tokens: int,
        max_target_tokens: int,
        family: Family = "causal",
        sentinel: bool = False,
        cuts_targets: bool = False,
        table_size: int | None = None,
        chat: ChatFormat | None = None,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        """Create an encoder.

        With ``cuts_targets``, targets longer than their limit are cut there and get no end token;
        otherwise they are refused. ``table_size`` is the number of rows in the model's embedding
        table, or None if no model will read the tokens. ``chat`` is the format that rows are put
        into, or None for bare texts. ``special_tokens`` says how texts of rows are read; a ``chat``
        has its own rule. Raises BadInput for a token beyond the table; so does every method that
        encodes a text.
        """
        self.tokenizer = tokenizer
        self._table_size = table_size
        self.template = template
        self.verbalizer = verbalizer
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens
        self.family = family
        self.chat = chat
        self.control = chat.control if chat else ControlTokens(tokenizer, special_tokens)
        # A chat template writes the special tokens in front itself.
        self._front, self._back = ([], []) if chat else _special_tokens(tokenizer)
        self.end_id: int | None = None if family == "masked" else tokenizer.eos_token_id
        if chat and chat.end_id is not None:
            self.end_id = chat.end_id
        if family == "causal":
            self._back = []  # the target continues where the input ends
        self._cuts_targets = cuts_targets
        self.stripped_rows: list[str] = []
        """Places of the rows in which the chat template stripped white space."""
        self._opening = [_sentinel(tokenizer, family)] if sentinel else []
        self._check_special_tokens()
        self.answers = [self.answer_ids(text) for text in verbalizer.texts] if verbalizer else []
        self._check_answers()

    @property
    def _ended(self) -> list[int]:
        """The ids that end a target: the end token, or none for a masked model.

        A masked model knows the target's length from the blank.
        """
        return [] if self.end_id is None else [self.end_id]

    @property
    def scored_answers(self) -> list[list[int]]:
        """The answers' token ids that ranking compares.

        They include the end token if one answer is the beginning of another. Without it, "A" would
        always be at least as likely as "A b".
        """
        if any(
            answer != other and other[: len(answer)] == answer
            for answer in self.answers
            for other in self.answers
        ):
            return self.ended_answers
        return self.answers

    @property
    def answer_words(self) -> list[list[int]]:
        """The answers' token ids without the sentinel, which is the same for all labels."""
        return [ids[len(self._opening) :] for ids in self.answers]

    @property
    def ended_answers(self) -> list[list[int]]:
        """The answers' token ids with the end token."""
        return [[*ids, *self._ended] for ids in self.answers]

    @property
    def front_ids(self) -> tuple[int, ...]:
        """Ids of the special tokens that stand in front of an input, unless a template has them."""
        return tuple(self._front)

    def segments(self, row: Row) -> list[str | Mark]:
        """Return a row's input, one turn of the user in a chat, as its texts and marks.

        Texts of templates are ``TemplateText``. Special tokens in front are not part of it.
        """
        filled = self._filled(row)
        return self.chat.segments([Turn(USER, filled)]) if self.chat else filled

    def _check_special_tokens(self) -> None:
        """Refuse a tokenizer whose special tokens, which are in every row, have no embedding."""
        mask = [self.tokenizer.mask_token_id] if self.family == "masked" else []
        special_ids = [*self._front, *self._back, *self._opening, *self._ended, *mask]
        self._check_table(special_ids, "every row")

    def _check_table(self, ids: Sequence[int], holder: str) -> None:
        """Refuse token ids beyond the embedding table.

        ``holder`` names the source of the ids in the message.
        """
        if self._table_size is None or max(ids, default=0) < self._table_size:
            return
        token_id = max(ids)
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        raise beyond_table(token, token_id, self._table_size, holder)

    def _check_answers(self) -> None:
        for index, ids in enumerate(self.answer_words):
            text = self.verbalizer.texts[index] if self.verbalizer else ""
            if not ids:
                raise BadInput(
                    f"data.verbalizer text {text!r} has no tokens",
                    "write a text that the tokenizer keeps",
                )
            if ids in self.answer_words[:index]:
                raise BadInput(
                    f"data.verbalizer text {text!r} has the same tokens as another",
                    "make the texts differ",
                )

    def answer_ids(self, text: str) -> list[int]:
        """Return the token ids with which the model gives an answer, without the end token."""
        ids = self._answer_ids(text)
        self._check_table(ids, f"the answer {shortened(text)}")
        return ids

    def _answer_ids(self, text: str) -> list[int]:
        if not text:
            return []
        if self.family == "seq2seq":
            # The decoder starts afresh, so a target is tokenised as a text of its own.
            return [*self._opening, *self._decoder_ids(text)]
        if self.chat:
            return self._continuation(self.chat.tail, self._chat_answer(self.chat, text))
        tail = self.template.tail
        if self.family == "causal" and self.template.has_blank:
            tail, text = tail.rstrip(), tail[len(tail.rstrip()) :] + text
        return self._continuation(tail, text)

    def _chat_answer(self, chat: ChatFormat, text: str) -> str:
        try:
            return chat.answer(text)
        except BadInput as error:
            raise BadInput(f"the answer {shortened(text)}: {error.message}", error.hint) from None

    def _decoder_ids(self, text: str) -> list[int]:
        """Return the ids of a text that an encoder-decoder model's decoder starts with."""
        pieces = self.control.pieces([text])
        if len(pieces) > 1:
            return self._text_ids([text], is_first=True)
        ids = list(self.tokenizer(text_target=text)["input_ids"])
        ids = ids[:-1] if ids[-1:] == self._ended else ids
        self.control.check(ids, [text])
        return ids

    def _continuation(self, tail: str, text: str) -> list[int]:
        """Return the ids of a text that follows a template's text."""
        pieces = self.control.pieces([TemplateText(tail), text])
        first = pieces[0][len(tail) :]
        ids = continuation_ids(self.tokenizer, tail, first) if first else []
        for piece in pieces[1:]:
            ids.extend(continuation_ids(self.tokenizer, "", piece))
        self.control.check(ids, [text])
        return ids

    def input_ids(self, segments: str | Sequence[str | Mark]) -> list[int]:
        """Return the token ids of a filled template, including the tokenizer's special tokens.

        For a causal model, special tokens stand in front only, since the target continues where the
        input ends. A template that writes them itself gets no second ones. Marks become negative
        entries, as described in ``models.placeholders``.
        """
        ids = self._marked_ids(
            parts_of(segments) if isinstance(segments, str) else self._until_blank(segments)
        )
        all_ids = [*self._missing_front(ids), *ids, *self._missing_back(ids)]
        return all_ids or [self.tokenizer.eos_token_id]  # a model can't start from nothing

    def _missing_front(self, ids: Sequence[int]) -> list[int]:
        """Return the special tokens to put in front of an input."""
        count = len(self._front)
        # Where texts can't write control tokens, the template has written these.
        is_written = self.control.rule == "text" and list(ids[:count]) == self._front
        return [] if is_written else self._front

    def _missing_back(self, ids: Sequence[int]) -> list[int]:
        """Return the special tokens to put behind an input."""
        count = len(self._back)
        is_written = self.control.rule == "text" and list(ids[len(ids) - count :]) == self._back
        return [] if is_written else self._back

    def _until_blank(self, segments: Sequence[str | Mark]) -> list[str | Mark]:
        """Return the segments that belong to the input.

        For a masked model these are all segments. For other models the input ends before the blank,
        without white space at its end.
        """
        input_segments: list[str | Mark] = []
        for segment in segments:
            if self.family != "masked" and isinstance(segment, Mark) and segment.is_blank:
                return _without_space_at_end(input_segments)
            input_segments.append(segment)
        return input_segments

    def _marked_ids(
        self, segments: Sequence[str | Mark], control: ControlTokens | None = None
    ) -> list[int]:
        ids: list[int] = []
        groups = 0
        for run in _runs(segments):
            if isinstance(run, Mark):
                ids.append(BLANK if run.is_blank else marker(groups))
                groups += not run.is_blank
            else:
                ids.extend(self._text_ids(run, not ids, control))
        texts = [segment for segment in segments if isinstance(segment, str)]
        self._check_table(ids, f"the text {shortened(''.join(texts))}")
        return ids

    def _text_ids(
        self, texts: Sequence[str], is_first: bool, control: ControlTokens | None = None
    ) -> list[int]:
        """Return the ids of adjacent texts; ``is_first`` says that nothing stands before them."""
        control = control or self.control
        ids: list[int] = []
        for piece in control.pieces(texts):
            if not piece:
                continue
            if is_first and not ids:
                ids.extend(self.tokenizer(piece, add_special_tokens=False)["input_ids"])
            else:
                ids.extend(continuation_ids(self.tokenizer, "", piece))
        control.check(ids, texts)
        return ids

    def segment_ids(self, segments: Sequence[str | Mark]) -> list[int]:
        """Return the ids of texts and marks without special tokens around them."""
        return self._marked_ids(segments)

    def row_ids(self, row: Row, before: str = "") -> list[int]:
        """Return the ids of a row's whole input, however long it is.

        Training, evaluation, serving and the pyfunc model all get their ids here. ``before`` is put
        in front of the input, for instance a written instruction; in a chat it opens the user's
        turn.
        """
        if messages := self.conversation(row):
            return self.conversation_ids(messages, before)
        if self.chat is None:
            return self.input_ids([*parts_of(before), *self.template.parts(row)])
        columns = ", ".join(map(repr, self.template.columns))
        with _naming(f"column {columns}"):
            return self._chat_ids(self.chat, [Turn(USER, self._filled(row, before))])

    def conversation(self, row: Row) -> list[Message]:
        """Return the messages that a row holds instead of texts; an empty list if it has none.

        Raises BadInput for a conversation that can't be read.
        """
        if self.chat is None or self.template.text != BARE_TEMPLATE:
            return []
        cell = row.get(PROMPT)
        if self.chat.column is not None and isinstance(cell, str):
            return [{"role": USER, "content": cell}]
        if not is_conversation(cell):
            return []
        with _naming(f"column {self._conversations_in!r}"):
            return read_input(cell)

    @property
    def _conversations_in(self) -> str:
        return (self.chat.column if self.chat else None) or PROMPT

    def conversation_ids(self, messages: Sequence[Message], before: str = "") -> list[int]:
        """Return the ids of a conversation whose last message fills the template.

        It is not cut. A prompt that was tuned on bare texts takes conversations too, if the base
        model has a chat template.
        """
        *earlier, last = messages
        filled = self._filled(self.template.row(last["content"]), before)
        turns = [*map(Turn.of, earlier), Turn(USER, filled)]
        with _naming(f"column {self._conversations_in!r}" if self.chat else ""):
            return self._chat_ids(self.chat or self._surroundings, turns)

    @cached_property
    def _surroundings(self) -> ChatFormat:
        """The chat template for conversations with a prompt that was tuned on bare texts."""
        return ChatFormat(self.tokenizer, rule=self.control.rule)

    def _filled(self, row: Row, before: str = "") -> list[str | Mark]:
        return [*parts_of(before), *self._until_blank(self.template.parts(row))]

    def _chat_ids(self, chat: ChatFormat, turns: Sequence[Turn]) -> list[int]:
        return self._marked_ids(chat.segments(turns), chat.control)

    def encode_input(self, row: Row, before: str = "") -> list[int]:
        """Return the ids of a row's input, cut to ``max_input_tokens``.

        While the input is too long, the longest column is cut at its end; the template is not cut.
        ``before`` is put in front of the input, for instance a written instruction, and does not
        count towards the limit. Raises BadInput when the template alone exceeds the limit, and for
        a conversation that exceeds it, since messages are not cut.
        """
        limit = self.max_input_tokens + (len(self.input_ids(before)) if before else 0)
        if self.conversation(row):
            return self._whole_conversation(row, before, limit)
        fitted = self.template.texts(row)
        while len(ids := self.row_ids(fitted, before)) > limit:
            column = max(self.template.columns, key=lambda name: len(fitted[name]))
            if not fitted[column]:
                break
            fitted[column] = self._cut(fitted[column], len(ids) - limit)
        if len(ids) > limit and self._template_tokens() > self.max_input_tokens:
            raise self._template_too_long()
        # Joined texts may need a token more than separate ones. A chat ends with control tokens.
        return ids if self.chat else ids[:limit]

    def _whole_conversation(self, row: Row, before: str, limit: int) -> list[int]:
        ids = self.row_ids(row, before)
        if (excess := len(ids) - limit) > 0:
            needed = self.max_input_tokens + excess
            raise BadInput(
                f"column {self._conversations_in!r}: the conversation takes {needed} tokens, and "
                f"data.max_input_tokens is {self.max_input_tokens}; messages are not cut",
                f"set data.max_input_tokens to {needed} or more, or leave such rows out",
            )
        return ids

    def check_template(self) -> None:
        """Refuse a template that leaves no room for a row's text within ``max_input_tokens``."""
        if self._template_tokens() >= self.max_input_tokens:
            raise self._template_too_long()

    def _template_tokens(self) -> int:
        """Count the tokens of the template with empty columns.

        Marks are included, since they count towards the limit.
        """
        segments = self._filled(dict.fromkeys(self.template.columns, ""))
        if self.chat:
            segments = self.chat.segments([Turn(USER, segments)], check=False)
        ids = self._marked_ids(segments)
        return len(self._missing_front(ids)) + len(ids) + len(self._missing_back(ids))

    def _template_too_long(self) -> BadInput:
        count = self._template_tokens()
        return BadInput(
            f"the template alone takes {count} tokens, and max_input_tokens is "
            f"{self.max_input_tokens}: no room is left for a row's own text",
            f"set data.max_input_tokens well above {count}, or shorten the template",
        )

    def _cut(self, text: str, excess: int) -> str:
        """Cut off the last ``excess`` tokens of a text, but at least one character."""
        if not getattr(self.tokenizer, "is_fast", False):
            keep = max(0, self._count(text) - excess)
            return text[: self._characters_of(text, keep)]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        keep = max(0, len(encoded["input_ids"]) - excess)
        if keep >= len(encoded["input_ids"]):
            return text[:-1]
        return text[: min(encoded["offset_mapping"][keep][0], len(text) - 1)]

    def _characters_of(self, text: str, tokens: int) -> int:
        """Return how many leading characters of a text take at most ``tokens`` tokens.

        For tokenizers that report no offsets.
        """
        ends = range(len(text))
        return bisect_right(ends, tokens, key=lambda length: self._count(text[:length])) - 1

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_target(self, row: Row, target: str) -> tuple[list[int], int]:
        """Return the target's ids with the end token, and the label's index in the verbalizer.

        The index is -1 without a verbalizer. Raises BadInput for a target without tokens, and for
        one longer than ``max_target_tokens`` unless the encoder cuts targets.
        """
        if self.verbalizer is not None:
            label_index = self.verbalizer.index(row[target])
            return [*self.answers[label_index], *self._ended], label_index
        ids = [*self.answer_ids(target_text(row[target])), *self._ended]
        if not ids:
            raise BadInput(
                f"a target has no tokens: {target_text(row[target])[:60]!r}",
                "a masked model fills in at least one token; drop such rows",
            )
        if len(ids) > self.max_target_tokens and self._cuts_targets:
            ids = ids[: self.max_target_tokens]
        if len(ids) > self.max_target_tokens:
            raise BadInput(
                f"a target has {len(ids)} tokens with its end token, data.max_target_tokens is "
                f"{self.max_target_tokens}: {target_text(row[target])[:60]!r}",
                f"set data.max_target_tokens to {len(ids)} or more, or drop such rows",
            )
        return ids, -1

    def refused_row(self, error: BadInput, row: Row | None) -> BadInput:
        """Put place and columns of a row in front of an error about its length."""
        if row is None or not self.conversation(row):
            return error if row is None else at_row(error, row)
        message = f"column {self._conversations_in!r}: {error.message}"
        hint = f"leave such rows out, or {error.hint}"
        return at_row(BadInput(message, hint), row)

    def encode(self, rows: Sequence[Row], target: str, before: str = "") -> Encoded:
        """Encode the rows of a split. Raises BadInput that names the place of the row."""
        inputs, targets, labels = [], [], []
        for row in rows:
            strips = self.chat.strips if self.chat else 0
            try:
                ids, label = self.encode_target(row, target)
                inputs.append(self.encode_input(row, before))
            except BadInput as error:
                raise at_row(error, row) from None
            if self.chat and self.chat.strips > strips:
                self.stripped_rows.append(place_of(row))
            targets.append(ids)
            labels.append(label)
        return Encoded(inputs, targets, labels)


def reference_texts(rows: Sequence[Row], data: DataSpec) -> list[list[str]]:
    """Return the right texts for each row, stripped.

    These are the texts of ``data.references``, or the target if a row has none there.
    """
    return [_right_texts(row, data) for row in rows]


def _right_texts(row: Row, data: DataSpec) -> list[str]:
    references = row[data.references] if data.references else None
    if isinstance(references, list) and references:
        return [text.strip() for text in references]
    return [target_text(row[data.target]).strip()]


def make_encoder(
    data: DataSpec,
    rows: RowSplits,
    tokenizer: Tokenizer,
    family: Family = "causal",
    table_size: int | None = None,
) -> Encoder:
    """Create the job's encoder, whose verbalizer holds the labels that the data has.

    Raises BadInput for a label without a text.
    """
    verbalizer = None
    chat = chat_format(data, tokenizer, family) if data.uses_chat else None
    if data.verbalizer is not None:
        labels = (row[data.target] for split in SPLITS for row in rows[split])
        verbalizer = Verbalizer.covering(data.verbalizer, labels)
    return Encoder(
        tokenizer, Template(data.template), verbalizer, data.max_input_tokens,
        data.max_target_tokens, family, data.sentinel, data.prefix_lm is not None, table_size,
        chat, data.special_tokens_in_text,
    )  # fmt: skip


def chat_format(data: DataSpec, tokenizer: Tokenizer, family: Family) -> ChatFormat:
    """Create the format of the job's conversations. Raises BadInput for an unfit base model."""
    if family != "causal":
        key = "data.chat" if data.messages is None else "data.messages"
        raise BadInput(
            f"{key}: chat templates are for causal models, and the base model is a {family} model",
            "leave it out, or choose a causal model",
        )
    return ChatFormat(tokenizer, data.system, data.special_tokens_in_text, data.messages)


@contextmanager
def _naming(column: str) -> Iterator[None]:
    """Put the name of a column in front of a refusal."""
    try:
        yield
    except BadInput as error:
        message = f"{column}: {error.message}" if column else error.message
        raise BadInput(message, error.hint) from None


def _runs(segments: Sequence[str | Mark]) -> Iterator[Mark | list[str]]:
    """Yield marks, and the adjacent texts between them as lists."""
    texts: list[str] = []
    for segment in segments:
        if isinstance(segment, str):
            texts.append(segment)
            continue
        if texts:
            yield texts
        texts = []
        yield segment
    if texts:
        yield texts


def _without_space_at_end(segments: Sequence[str | Mark]) -> list[str | Mark]:
    """Drop the white space behind the last mark or word."""
    remaining = list(segments)
    while remaining and isinstance(last := remaining[-1], str):
        text = last.rstrip()
        if text:
            remaining[-1] = TemplateText(text) if isinstance(last, TemplateText) else text
            break
        remaining.pop()
    return remaining


def shortened(text: str) -> str:
    """Quote a text for a message; a long text loses its middle."""
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-17:]}")


def _sentinel(tokenizer: Tokenizer, family: Family) -> int:
    """Return the id of the first sentinel token (Raffel et al. 2020).

    Raises BadInput for a model or tokenizer without one.
    """
    sentinel_id = tokenizer.get_vocab().get(SENTINEL)
    if family != "seq2seq" or sentinel_id is None:
        problem = f"a {family} model has none"
        if family == "seq2seq":
            problem = f"the base model's tokenizer has no {SENTINEL}"
        raise BadInput(f"data.sentinel: {problem}", "leave data.sentinel out, or choose a T5 model")
    return int(sentinel_id)


def check_context(
    encoder: Encoder,
    splits: Mapping[str, Encoded],
    prompt_tokens: int,
    context: int,
    rows: RowSplits | None = None,
) -> None:
    """Refuse a job whose longest prompt and row don't fit into the model's context together.

    ``rows`` are the rows that were encoded, so that the message can name the longest one.
    """
    longest, split = max((max(encoded.lengths), split) for split, encoded in splits.items())
    if prompt_tokens + longest > context:
        error = BadInput(
            f"{prompt_tokens} virtual tokens and {longest} tokens of input and target "
            f"exceed the context of {context}",
            f"lower data.max_input_tokens (now {encoder.max_input_tokens}) "
            "or search.space.num_virtual_tokens",
        )
        row = rows[split][splits[split].lengths.index(longest)] if rows else None
        raise encoder.refused_row(error, row)


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the special tokens that the tokenizer puts in front of a text, and those behind it."""
    without_special = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    with_special = list(tokenizer("a")["input_ids"])
    for start in range(len(with_special) - len(without_special) + 1):
        if with_special[start : start + len(without_special)] == without_special:
            return with_special[:start], with_special[start + len(without_special) :]
    return [], []


def check_generation(
    splits: Mapping[str, Encoded], prompt_tokens: int, context: int, max_tokens: int
) -> None:
    """Refuse a job whose generated texts may outgrow the model's context.

    The check assumes the longest prompt, the longest input and a text of ``max_tokens`` tokens.
    """
    longest = max(len(ids) for split in splits.values() for ids in split.inputs)
    if prompt_tokens + longest + max_tokens > context:
        raise BadInput(
            f"{prompt_tokens} virtual tokens, an input of {longest} tokens and a generated text of "
            f"{max_tokens} exceed the context of {context}",
            f"set generation.max_tokens below {max_tokens}, or lower data.max_input_tokens",
        )
