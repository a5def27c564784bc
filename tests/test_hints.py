"""Every command named in a message, a help text or a page is accepted by the command line."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import typer.main

from orchestrator import cli

PACKAGE = Path(cli.__file__).parents[1]
ROOT = PACKAGE.parent
DOCUMENTS = [
    *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "jobs").rglob("*.yaml")),
    *sorted(ROOT.glob("[CR]*.md")), *sorted((ROOT / "deploy").rglob("*.md")),
]  # fmt: skip
"""Pages and jobs of the repository. Old commands may stand in the changelog's older entries."""
CODE = re.compile(r"^```.*?^```|`[^`\n]+`|^ *#.*?$", re.MULTILINE | re.DOTALL)
"""What is code on a page: fenced blocks and spans, and comments of a YAML file."""
CONTINUED = re.compile(r" *\\\n *#? *")
"""The end of a line that goes on in the next one, which may be a comment's."""
FILLED_IN = "1"  # placeholder for a value: valid as a name and as a number
VERSION = [FILLED_IN]  # `orchestrator 0.1.0` is not a command
ADDS_OPTIONS = {"_option", "repeated"}  # these functions return options, or nothing
COMMAND = re.compile(r"(?<![\w./-])(?<!import )orchestrator +([a-z][\w-]*|1\b)([^`,;()\n]*)")
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


@lru_cache
def verbs() -> dict[str, Any]:
    """Return the verbs of the command line by their names."""
    return typer.main.get_command(cli.app).commands  # type: ignore[attr-defined, no-any-return]


def problem(words: list[str]) -> str:
    """Why the command line does not take the command, or "".

    Words of prose may follow the command, but no option may be among them.
    """
    if words[0] not in verbs():
        return f"no verb {words[0]}"
    if words[1:] == ["--help"]:
        return ""
    reason = ""
    for count in range(len(words), 0, -1):
        try:
            verbs()[words[0]].make_context(words[0], list(words[1:count]))
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


def on_page(text: str) -> list[list[str]]:
    """Return the commands in a page's code. Prose outside of code only mentions the program."""
    parts = (match[0] for match in CODE.finditer(CONTINUED.sub(" ", text.replace("...", ""))))
    return [words for part in parts for words in commands(part) if words != VERSION]


def mentions(words: list[str]) -> bool:
    """Tell whether a command is a verb with names of its options, and no values."""
    verb = verbs().get(words[0])
    options = {name for option in verb.params for name in option.opts} if verb else set()
    return len(words) > 1 and {*words[1:]} <= options


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_command_on_a_page_is_taken(page: Path) -> None:
    """Commands in the code of pages, and in the comments of jobs, have valid verbs and options."""
    for words in on_page(page.read_text(encoding="utf-8")):
        reason = "" if mentions(words) else problem(words)
        assert not reason, f"orchestrator {shlex.join(words)}: {reason}"


def test_a_wrong_command_on_a_page_would_be_noticed() -> None:
    """Commands are found in spans, in blocks of any language and in comments, and not in prose."""
    page = (
        "An orchestrator srves. `orchestrator srve`, `orchestrator run --sett`\n"
        "```sh\norchestrator runn x\n```\n# orchestrator ui \\\n#   --x"
    )
    found = on_page(page)
    assert found == [["srve", "--help"], ["run", "--sett"], ["runn", "x"], ["ui", "--x"]]
    assert all(map(problem, found)) and not any(map(mentions, found))
    assert mentions(["submit", "--retries"])


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
