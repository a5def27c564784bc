"""Reading of conversations, and the rows that they become.

A conversation is a list of messages: {role, content} as OpenAI, TRL and Axolotl write them, or
ShareGPT's {from, value}. It becomes a row with the columns ``prompt``, the messages up to an answer
of the assistant, and ``completion``, the text of that answer. All faults that show without the base
model's chat template are refused here, with the row and the column.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orchestrator.data.cells import cell_text, is_blank, is_missing
from orchestrator.data.source_row import SourceRow, place_of
from orchestrator.errors import BadInput
from orchestrator.job.spec import BARE_TEMPLATE, COMPLETION, PROMPT, DataSpec

Row = Mapping[str, Any]
Message = dict[str, str]
"""A message with the keys role and content; both are texts."""

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {
    "system": SYSTEM, "developer": SYSTEM,
    "user": USER, "human": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "model": ASSISTANT,
}  # fmt: skip
TOOL_ROLES = ("tool", "function", "function_call", "tool_call", "observation", "ipython")
TOOL_KEYS = ("tool_calls", "tool_call_id", "function_call")
MEANINGFUL = {
    "reasoning_content": "a chain of thought", "thinking": "a chain of thought",
    "weight": "weights of turns", "train": "a choice of turns",
}  # fmt: skip
"""Keys of a message that would change its meaning, and what they hold."""
NO_TOOLS = "leave such rows out: tool calls are not supported"
HINT = "correct the row, or leave it out"


def is_conversation(cell: Any) -> bool:
    """Tell whether a cell holds messages instead of a text."""
    listed = cell.tolist() if hasattr(cell, "tolist") else cell
    return isinstance(listed, list | tuple) and all(isinstance(item, Mapping) for item in listed)


def read_messages(cell: Any) -> list[Message]:
    """Return the messages of a conversation with the usual roles.

    Raises BadInput that names the turn, counted from 1.
    """
    listed = cell.tolist() if hasattr(cell, "tolist") else cell
    if not isinstance(listed, list | tuple) or not listed:
        raise BadInput(
            f"holds {str(cell)[:60]!r}, which is no list of messages",
            "write messages as {role, content}; .jsonl and .parquet files can hold lists",
        )
    messages = [_message(number, item) for number, item in enumerate(listed, start=1)]
    systems = [index for index, message in enumerate(messages) if message["role"] == SYSTEM]
    if len(systems) > 1:
        raise BadInput(f"has {len(systems)} system messages", f"keep one of them; {HINT}")
    if systems and systems[0] > 0:
        raise BadInput(f"has its system message as turn {systems[0] + 1}", "put it first")
    return messages


def read_input(cell: Any) -> list[Message]:
    """Return the messages up to an answer, the last of which is the user's. Raises BadInput."""
    messages = read_messages(cell)
    if messages[-1]["role"] != USER:
        raise BadInput(
            f"has a turn of {messages[-1]['role']} right before the answer, not the user's", HINT
        )
    return messages


def _message(number: int, item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise BadInput(f"turn {number} is {str(item)[:60]!r}, not a message", HINT)
    keys = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    role, content = item.get(keys[0]), item.get(keys[1])
    if tools := [key for key in TOOL_KEYS if _holds(item.get(key))]:
        raise BadInput(f"turn {number} has {tools[0]}", NO_TOOLS)
    if role in TOOL_ROLES:
        raise BadInput(f"turn {number} has the role {role!r}, which belongs to tools", NO_TOOLS)
    if not isinstance(role, str) or role not in ROLES:
        raise BadInput(
            f"turn {number} has the role {role!r}; the known roles are {', '.join(ROLES)}",
            f"correct its {keys[0]}",
        )
    for key, meaning in MEANINGFUL.items():
        if _holds(item.get(key)):
            raise BadInput(f"turn {number} has {key}: {meaning} is not supported", "leave it out")
    return {"role": ROLES[role], "content": _content(number, content)}


def _holds(value: Any) -> bool:
    """Tell whether an optional key of a message says anything."""
    return not is_missing(value) and value not in ("", [], {}, True, 1)


def _content(number: int, content: Any) -> str:
    """Return a message's text; parts of type text are joined."""
    if isinstance(content, list | tuple):
        content = "".join(_part(number, part) for part in content)
    if is_missing(content) or (isinstance(content, str) and is_blank(content)):
        raise BadInput(f"turn {number} has no content", f"fill it in; {HINT}")
    if not isinstance(content, str):
        raise BadInput(f"turn {number} has {str(content)[:60]!r} as its content", "write a text")
    return cell_text(content)


def _part(number: int, part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text":
        return str(part.get("text") or "")
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise BadInput(
        f"turn {number} has content of type {kind!r}; only text is supported",
        "leave such rows out",
    )


# Rows


@dataclass
class Conversations:
    """The rows of a job, with conversations cut into prompt and completion."""

    data: DataSpec
    behind: dict[str, list[SourceRow]] = field(default_factory=dict)
    """Rows of each split that have turns behind the last answer."""

    @property
    def expected(self) -> bool:
        """Tell whether rows may hold conversations."""
        return self.data.messages is not None or self.data.template == BARE_TEMPLATE

    def read(self, rows: Sequence[Row], split: str) -> Sequence[Row]:
        """Return the rows of a split in the form prompt and completion.

        Rows that hold no conversation are returned as they are. Raises BadInput that names row and
        column.
        """
        if not self.expected:
            return rows
        return [self._row(row, number, split) for number, row in enumerate(rows, start=1)]

    def notes(self) -> tuple[str, ...]:
        """Say how many rows have turns behind their last answer."""
        return tuple(
            f"{len(rows)} of the conversations of {split} have turns behind the assistant's last "
            f"answer, which are not read, for instance {place_of(rows[0], split)}"
            for split, rows in self.behind.items()
        )

    def _row(self, row: Row, number: int, split: str) -> Row:
        source_row = row if isinstance(row, SourceRow) else SourceRow(row, number=number)
        if self.data.messages is not None:
            return self._from_messages(source_row, self.data.messages, split)
        column = self._column(source_row, PROMPT)
        if column is None or not is_conversation(source_row[column]):
            return row
        return self._from_prompt(source_row, column, split)

    def _from_messages(self, row: SourceRow, name: str, split: str) -> SourceRow:
        column = self._column(row, name)
        if column is None:
            raise BadInput(
                f"data.messages names column {name!r}, which {place_of(row, split)} lacks; it has "
                f"{sorted(row)}",
                "correct data.messages, or map the column with data.rename",
            )
        with _at(row, split, column):
            messages = read_messages(row[column])
            last = _last_answer(messages)
            before = read_input(messages[:last]) if last else []
            if not before:
                raise BadInput("has no turn of the user before the answer", HINT)
        if last + 1 < len(messages):
            self.behind.setdefault(split, []).append(row)
        return _cut(row, before, messages[last]["content"])

    def _from_prompt(self, row: SourceRow, column: str, split: str) -> SourceRow:
        if not self.data.uses_chat:
            raise BadInput(
                f"{place_of(row, split)} has messages in column {column!r}, and data.chat is not "
                "set",
                "set data.chat: true, which puts them into the base model's chat template",
            )
        with _at(row, split, column):
            before = read_input(row[column])
        name = self._column(row, COMPLETION)
        answer = row[name] if name is not None else None
        if name is not None and is_conversation(answer):
            with _at(row, split, name):
                answer = _only_answer(read_messages(answer))
        return _cut(row, before, answer)

    def _column(self, row: Row, name: str) -> str | None:
        """Return the row's own name of a column that may be renamed; None if the row lacks it."""
        names = [name, *(old for old, new in self.data.rename.items() if new == name)]
        return next((candidate for candidate in names if candidate in row), None)


def every_answer(rows: Sequence[Row]) -> Iterator[Row]:
    """Yield a row for each answer of the assistant in a conversation, in order."""
    for row in rows:
        prompt = row.get(PROMPT)
        if isinstance(row, SourceRow) and isinstance(prompt, list):
            for index, message in enumerate(prompt):
                if message["role"] == ASSISTANT and prompt[index - 1]["role"] == USER:
                    yield _cut(row, prompt[:index], message["content"])
        yield row


def _last_answer(messages: Sequence[Message]) -> int:
    answer_indices = [
        index for index, message in enumerate(messages) if message["role"] == ASSISTANT
    ]
    if not answer_indices:
        raise BadInput("has no turn of the assistant, so there is nothing to learn", HINT)
    return answer_indices[-1]


def _only_answer(messages: Sequence[Message]) -> str:
    if len(messages) != 1 or messages[0]["role"] != ASSISTANT:
        roles = ", ".join(message["role"] for message in messages)
        raise BadInput(
            f"holds turns of {roles}; one turn of the assistant belongs there",
            "move the others to the prompt",
        )
    return messages[0]["content"]


def _cut(row: SourceRow, before: Sequence[Message], answer: Any) -> SourceRow:
    return row.with_cells({**row, PROMPT: list(before), COMPLETION: answer})


@contextmanager
def _at(row: SourceRow, split: str, column: str) -> Iterator[None]:
    """Put row and column in front of a refusal."""
    try:
        yield
    except BadInput as error:
        where = f"{place_of(row, split)}, column {column!r}"
        raise BadInput(f"{where}: {error.message}", error.hint) from None
