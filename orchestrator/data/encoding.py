"""Rows to token ids: the input through the template, the target after it, both within their limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from orchestrator.data.dataset import SPLITS, RowSplits
from orchestrator.data.template import Template, Verbalizer, answer_ids, continuation_ids
from orchestrator.errors import BadInput
from orchestrator.spec import DataSpec

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Encoded:
    """A tokenised split: ids of ``inputs`` and ``targets`` (end token included), labels as places in the verbalizer.

    ``references``: for each row the texts that a generated one is compared with, stripped; empty where none will be.
    """

    inputs: list[list[int]]
    targets: list[list[int]]
    labels: list[int]
    references: list[list[str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def lengths(self) -> list[int]:
        return [len(ids) + len(target) for ids, target in zip(self.inputs, self.targets, strict=True)]


class Encoder:
    """Template, verbalizer and tokenizer together: the same for training, evaluation and serving."""

    def __init__(
        self,
        tokenizer: Any,
        template: Template,
        verbalizer: Verbalizer | None,
        max_input_tokens: int,
        max_target_tokens: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.verbalizer = verbalizer
        self.max_input_tokens = max_input_tokens
        self.max_target_tokens = max_target_tokens
        self.end_id: int = tokenizer.eos_token_id
        self._adds_end = _ids(tokenizer, "a")[-1:] == [self.end_id]
        self.answers = answer_ids(tokenizer, template, verbalizer.texts) if verbalizer else []
        self._check_answers()

    @property
    def scored_answers(self) -> list[list[int]]:
        """What ranking compares: the answers' tokens, with the end token where one answer begins another.

        Without the end token, "A" would always be at least as likely as "A b".
        """
        if any(a != b and b[: len(a)] == a for a in self.answers for b in self.answers):
            return [[*ids, self.end_id] for ids in self.answers]
        return self.answers

    def _check_answers(self) -> None:
        for place, ids in enumerate(self.answers):
            text = self.verbalizer.texts[place] if self.verbalizer else ""
            if not ids:
                raise BadInput(f"data.verbalizer text {text!r} has no tokens", "write a text that the tokenizer keeps")
            if ids in self.answers[:place]:
                raise BadInput(f"data.verbalizer text {text!r} has the same tokens as another", "make the texts differ")

    def input_ids(self, text: str) -> list[int]:
        """Ids of a filled template, special tokens as the tokenizer sets them in front, never an end token."""
        ids = _ids(self.tokenizer, text)
        ids = ids[:-1] if self._adds_end and len(ids) > 1 else ids
        return ids or [self.end_id]  # a model can't start from nothing

    def encode_input(self, row: Row, before: str = "") -> list[int]:
        """Ids of a row's input within ``max_input_tokens``: the longest column is cut at its end, the template stays.

        ``before`` is put in front (a written instruction) and is not counted in the limit.
        """
        limit = self.max_input_tokens + (len(_ids(self.tokenizer, before)) if before else 0)
        fitted = {name: "" if cell is None else str(cell) for name, cell in row.items()}
        while len(ids := self.input_ids(before + self.template.fill(fitted))) > limit:
            column = max(self.template.columns, key=lambda name: len(fitted[name]))
            shorter = self._cut(fitted[column], len(ids) - limit)
            if shorter == fitted[column]:
                return ids[:limit]  # the template alone is longer than the limit
            fitted[column] = shorter
        return ids

    def _cut(self, text: str, excess: int) -> str:
        """The text without its last ``excess`` tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        keep = max(0, len(encoded["input_ids"]) - excess)
        return text[: encoded["offset_mapping"][keep][0]] if keep < len(encoded["input_ids"]) else text[:-1]

    def encode_target(self, row: Row, target: str) -> tuple[list[int], int]:
        """Target ids with the end token, and the label's place (-1 without a verbalizer)."""
        if self.verbalizer is not None:
            place = self.verbalizer.index(row[target])
            return [*self.answers[place], self.end_id], place
        ids = continuation_ids(self.tokenizer, self.template.tail, str(row[target])) if str(row[target]) else []
        if len(ids) + 1 > self.max_target_tokens:
            raise BadInput(
                f"a target has {len(ids) + 1} tokens with its end token, data.max_target_tokens is "
                f"{self.max_target_tokens}: {str(row[target])[:60]!r}",
                f"set data.max_target_tokens to {len(ids) + 1} or more, or drop such rows",
            )
        return [*ids, self.end_id], -1

    def encode(self, rows: Sequence[Row], target: str, before: str = "") -> Encoded:
        targets = [self.encode_target(row, target) for row in rows]
        return Encoded(
            inputs=[self.encode_input(row, before) for row in rows],
            targets=[ids for ids, _ in targets],
            labels=[place for _, place in targets],
        )


def reference_texts(rows: Sequence[Row], data: DataSpec) -> list[list[str]]:
    """What is right for each row, stripped: the texts of ``data.references``, or the target where there are none."""
    lists = (row[data.references] if data.references else None for row in rows)
    return [
        [text.strip() for text in texts] if texts else [str(row[data.target]).strip()]
        for row, texts in zip(rows, lists, strict=True)
    ]


def make_encoder(data: DataSpec, rows: RowSplits, tokenizer: Any) -> Encoder:
    """The job's encoder; its verbalizer holds the labels that the data has. BadInput for a label without a text."""
    verbalizer = None
    if data.verbalizer is not None:
        seen = (row[data.target] for split in SPLITS for row in rows[split])
        verbalizer = Verbalizer.covering(data.verbalizer, seen)
    return Encoder(tokenizer, Template(data.template), verbalizer, data.max_input_tokens, data.max_target_tokens)


def check_context(encoder: Encoder, splits: Mapping[str, Encoded], prompt_tokens: int, context: int) -> None:
    """Refuse a job whose longest prompt, input and target don't fit into the model's context together."""
    longest = max(max(split.lengths) for split in splits.values())
    if prompt_tokens + longest > context:
        raise BadInput(
            f"{prompt_tokens} virtual tokens and {longest} tokens of input and target exceed the context of {context}",
            f"lower data.max_input_tokens (now {encoder.max_input_tokens}) or search.space.num_virtual_tokens",
        )


def check_generation(splits: Mapping[str, Encoded], prompt_tokens: int, context: int, max_tokens: int) -> None:
    """Refuse a job whose generated texts, behind the longest prompt and input, may outgrow the model's context."""
    longest = max(len(ids) for split in splits.values() for ids in split.inputs)
    if prompt_tokens + longest + max_tokens > context:
        raise BadInput(
            f"{prompt_tokens} virtual tokens, an input of {longest} tokens and a generated text of {max_tokens} exceed "
            f"the context of {context}",
            f"set generation.max_tokens below {max_tokens}, or lower data.max_input_tokens",
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])
