"""Every command named in an error message, hint or help text is accepted by the command line."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from orchestrator import cli

PACKAGE = Path(cli.__file__).parents[1]
FILLED_IN = "1"  # placeholder for a value: valid as a name and as a number
VERSION = [FILLED_IN]  # `orchestrator 0.1.0` is not a command
ADDS_OPTIONS = {"_option", "repeated"}  # these functions return options, or nothing
COMMAND = re.compile(r"(?<![\w./-])orchestrator +([a-z][\w-]*|1\b)([^`,;()\n]*)")
ENDS = re.compile(r" {3,}| && | \| |[.:] |[.:'\"]$")
# A text that only mentions a verb.
VERB_ALONE = re.compile(r"`+(orchestrator [\w-]+)`+|the same (orchestrator [\w-]+)")


def strings(file: Path) -> Iterator[tuple[int, str]]:
    """Yield every string of a module with its line; values in f-strings are filled in."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = {
        id(value)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for value in node.values
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield node.lineno, "".join(map(filled_in, node.values))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts
        ):
            yield node.lineno, node.value


def filled_in(part: ast.expr) -> str:
    """Return the part's text, or a placeholder for its value."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    value = part.value if isinstance(part, ast.FormattedValue) else part
    if (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id in ADDS_OPTIONS
    ):
        return ""
    return FILLED_IN


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words after each `orchestrator`, up to the latest possible end of the command.

    Prose may follow the command.
    """
    # A text that only mentions a verb has no arguments after it, but the verb must exist all the
    # same.
    text = VERB_ALONE.sub(lambda found: f"`{found[1] or found[2]} --help`", text)
    for found in COMMAND.finditer(text):
        verb, rest = found[1], ENDS.split(found[2])[0]
        try:
            words = shlex.split(rest)
        except ValueError:  # an apostrophe of the prose
            words = rest.split()
        yield [verb, *(FILLED_IN if re.fullmatch(r"[A-Z]+", word) else word for word in words)]


def named() -> list[tuple[str, list[str]]]:
    """Return every command that is named in the package, with its place."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for line, text in strings(file):
            found += [(f"{file.relative_to(PACKAGE)}:{line}", words) for words in commands(text)]
    for file in sorted((PACKAGE / "cli" / "starter").glob("*.yaml")):
        found += [(file.name, words) for words in commands(file.read_text(encoding="utf-8"))]
    return [(place, words) for place, words in found if words != VERSION]


def problem(words: list[str]) -> str:
    """Why the command line does not take the command, or "".

    Words of prose may follow the command, but no option may be among them.
    """
    verbs: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    if words[0] not in verbs:
        return f"no verb {words[0]}"
    if words[1:] == ["--help"]:
        return ""
    reason = ""
    for count in range(len(words), 0, -1):
        try:
            verbs[words[0]].make_context(words[0], list(words[1:count]))
        except (
            Exception
        ) as error:  # click's usage errors, of its own or of a copy that typer brings
            reason = reason or getattr(error, "message", "") or str(error)
            continue
        options = [word for word in words[count:] if word.startswith("-")]
        return reason if options else ""
    return reason


@pytest.mark.parametrize(
    ("place", "words"), [pytest.param(*it, id=f"{it[0]} {' '.join(it[1])[:40]}") for it in named()]
)
def test_a_command_that_is_named_is_taken(place: str, words: list[str]) -> None:
    """Its verb, options and values exist, and no argument is missing."""
    assert not problem(words), f"{place}: orchestrator {shlex.join(words)}: {problem(words)}"


def test_the_commands_of_hints_are_found() -> None:
    """Commands are found in plain strings, in f-strings and in the package's files."""
    found = {(place.split(":")[0], words[0]) for place, words in named()}
    for known in (
        ("job/yaml/load.py", "init"),
        ("search/resume.py", "resume"),
        ("job.yaml", "plan"),
        ("cli/tune.py", "demo"),
    ):
        assert known in found, known
    assert len(found) > 40


@pytest.mark.parametrize(
    "wrong",
    [
        "orchestrator strat", "orchestrator logs --folow ID", "orchestrator promote NAME",
        "orchestrator logs ID --last", "the same orchestrator sumbit", "orchestrator ui --port x",
        "start one with `orchestrator srve`", "orchestrator run",
    ],
)  # fmt: skip
def test_a_wrong_command_would_be_noticed(wrong: str) -> None:
    """Unknown verbs and options, missing arguments and values of the wrong type are noticed."""
    (words,) = commands(wrong)
    assert problem(words)


def test_hints_name_no_file_of_the_clone() -> None:
    """Hints name no file of the repository, because an installed wheel has no jobs/ folder."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for line, text in strings(file):
            assert not re.search(r"(?<![\w/])jobs/\w", text), (
                f"{file.relative_to(PACKAGE)}:{line}: {text}"
            )
