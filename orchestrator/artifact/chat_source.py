"""The chat template of a model folder that holds prompts as tokens.

The template puts a prompt's virtual tokens where this project's server puts them. A variable of the
template, ``prompt``, names one of several prompts. A prompt that was tuned in a chat writes its
tokens around the base model's own template, whose source is kept as it is. A prompt that was tuned
on bare text takes one message, which fills its template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.artifact.layout import (
    Column,
    Layout,
    Part,
    Virtual,
    literal,
    opening,
    parts_of,
    placeholders,
)
from orchestrator.data.chat import DATE
from orchestrator.data.encoding import Encoder

VARIABLE = "prompt"
"""Variable of the template that names a prompt."""


@dataclass(frozen=True)
class ChatEntry:
    """A prompt of the folder, as the chat template needs it."""

    name: str
    tokens: tuple[str, ...]
    in_chat: bool
    content: tuple[Part, ...]
    """What the last message becomes: for a prompt on bare text, the whole input."""
    in_front: str = ""
    """Virtual tokens in front of the conversation."""
    system: str | None = None
    """The system message of conversations that have none."""
    opening: str = ""
    """The text that opens an answer behind the base model's template."""

    @property
    def takes_messages(self) -> bool:
        """Tell whether a message can fill the template, which then has one column."""
        return len({part.name for part in self.content if isinstance(part, Column)}) == 1


def chat_entry(name: str, tokens: Sequence[str], encoder: Encoder, layout: Layout) -> ChatEntry:
    """Describe a prompt for the chat template."""
    if encoder.chat is None:
        return ChatEntry(name, tuple(tokens), False, layout.parts)
    columns = placeholders(encoder)
    row = {column: placeholder for placeholder, column in columns.items()}
    content = parts_of(encoder.template.parts(row), columns, len(tokens))
    places = any(isinstance(part, Virtual) for part in content)
    return ChatEntry(
        name,
        tuple(tokens),
        True,
        content,
        "" if places else "".join(tokens),
        encoder.chat.system,
        str(encoder.segments(row)[-1]),
    )


def chat_source(entries: Sequence[ChatEntry], base: str | None) -> str:
    """Return the source of the folder's chat template; ``base`` is that of the base model."""
    names = [entry.name for entry in entries]
    chosen = f"{{%- set chosen = {VARIABLE} if {VARIABLE} is defined else {_quoted(names[0])} -%}}"
    unknown = f"there is no prompt of this name; the prompts are {', '.join(names)}"
    lines = [
        DATE if base and "strftime_now" in base else "",
        chosen,
        f"{{%- if chosen not in [{', '.join(map(_quoted, names))}] -%}}"
        f"{{{{ raise_exception({_quoted(unknown)}) }}}}{{%- endif -%}}",
        "{%- set ns = namespace(last=-1, turns=[]) -%}",
        "{%- for m in messages -%}{%- if m.role == 'user' -%}"
        "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}",
    ]
    bare = [entry for entry in entries if not entry.in_chat]
    chats = [entry for entry in entries if entry.in_chat]
    lines += [_bare_branch(entry, names) for entry in bare]
    lines += [_turns(entry, names) for entry in chats]
    head = "\n".join(line for line in lines if line)
    if not chats or base is None:
        return head
    in_front = "".join(_when(entry, f"{{{{ {_quoted(entry.in_front)} }}}}") for entry in chats)
    return head + in_front + _own_template(base, chats, bare)


def _own_template(base: str, chats: Sequence[ChatEntry], bare: Sequence[ChatEntry]) -> str:
    """Return the base model's template, left out for prompts on bare text.

    Behind a block the line break is dropped, so the template begins at a line as it did alone.
    Jinja drops the last line break of a template.
    """
    endings = "".join(
        f"{{{{ {_quoted(entry.opening)} if add_generation_prompt and chosen == "
        f"{_quoted(entry.name)} else '' }}}}"
        for entry in chats
        if entry.opening
    )
    own = "{% set messages = ns.turns %}\n" + base.removesuffix("\n") + endings
    if not bare:
        return own
    return f"{{% if {_one_of(chats)} %}}{own}{{% endif %}}"


def _bare_branch(entry: ChatEntry, names: Sequence[str]) -> str:
    """Write the input of a prompt on bare text."""
    if not entry.takes_messages:
        return _when(entry, _refusal(f"the template of {entry.name} has several columns"))
    several = _refusal(f"{entry.name} was tuned on bare text and takes one message of the user")
    check = f"{{%- if messages | length != 1 or ns.last != 0 -%}}{several}{{%- endif -%}}"
    content = f"{{%- set content = {_escaped('messages[0].content', names)} -%}}"
    return _when(entry, f"{check}{content}{{{{- {_expression(entry)} -}}}}")


def _turns(entry: ChatEntry, names: Sequence[str]) -> str:
    """Collect the messages that the base model's template is given."""
    if not entry.takes_messages:
        return _when(entry, _refusal(f"the template of {entry.name} has several columns"))
    system = ""
    if entry.system is not None:
        message = f"{{'role': 'system', 'content': {_quoted(entry.system)}}}"
        system = (
            "{%- if messages[0].role != 'system' -%}"
            f"{{%- set ns.turns = [{message}] -%}}{{%- endif -%}}"
        )
    loop = (
        "{%- for m in messages -%}{%- if m.content is string -%}"
        f"{{%- set content = {_escaped('m.content', names)} -%}}"
        f"{{%- set filled = {_expression(entry)} if loop.index0 == ns.last else content -%}}"
        "{%- set ns.turns = ns.turns + ([{'role': m.role, 'content': filled}]"
        " if filled != m.content else [m]) -%}"
        "{%- elif loop.index0 == ns.last -%}"
        + _refusal("the last message of the user has to be a text")
        + "{%- else -%}{%- set ns.turns = ns.turns + [m] -%}{%- endif -%}{%- endfor -%}"
    )
    return _when(entry, system + loop)


def _expression(entry: ChatEntry) -> str:
    """Return a Jinja expression of the filled template; ``content`` is the message's text."""
    pieces = (
        "content" if isinstance(part, Column) else _quoted(literal(part, entry.tokens))
        for part in entry.content
    )
    return " ~ ".join(pieces)


def _escaped(expression: str, names: Sequence[str]) -> str:
    """Return an expression of a message's text in which no virtual token is read.

    A space is put behind the opening bracket of each word that looks like one.
    """
    replaced = "".join(
        f" | replace({_quoted(opening(name))}, {_quoted('< ' + opening(name)[1:])})"
        for name in names
    )
    return expression + replaced


def _when(entry: ChatEntry, body: str) -> str:
    return f"{{%- if chosen == {_quoted(entry.name)} -%}}{body}{{%- endif -%}}"


def _one_of(entries: Sequence[ChatEntry]) -> str:
    return f"chosen in [{', '.join(_quoted(entry.name) for entry in entries)}]"


def _refusal(message: str) -> str:
    return f"{{{{ raise_exception({_quoted(message)}) }}}}"


def _quoted(text: str) -> str:
    """Return a text as a literal of Jinja, which reads escapes as Python does."""
    return json.dumps(text, ensure_ascii=False)
