"""The pages that list the job spec's choices name every one of them, and the README every verb."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from orchestrator.cli.entry import app
from orchestrator.job.space import INIT_FIELDS
from orchestrator.job.spec import MethodName, NamedInit, Optimizer, Schedule, Scheduler, Searcher

ROOT = Path(__file__).parents[2]
INITS = {*get_args(NamedInit), *INIT_FIELDS}
LISTS: dict[str, tuple[str, str, set[str]]] = {
    "inits": ("README.md", "Inits are ", INITS),
    "searchers": ("README.md", "`search.searcher` is ", {*get_args(Searcher)}),
    "schedulers": ("README.md", "`search.scheduler` is ", {*get_args(Scheduler)}),
    "optimisers": ("README.md", "`train` has `optimizer` (", {*get_args(Optimizer)}),
    "schedules": ("README.md", "`schedule` (", {*get_args(Schedule)}),
}
"""The page, the words that its list follows, and the names that have to be in that list."""


def missing(page: str, opening: str, names: set[str]) -> set[str]:
    """Return the names that are not in the paragraph after the opening words."""
    _, found, rest = page.partition(opening)
    assert found, f"no list begins with {opening!r}"
    listed = rest.split("\n\n")[0]
    return {name for name in names if not re.search(rf"\b{re.escape(name)}\b", listed)}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_of_choices_is_complete(case: str) -> None:
    """A list in prose names each choice that the job spec allows, and notices one that it lacks."""
    file, opening, names = LISTS[case]
    page = (ROOT / file).read_text(encoding="utf-8")
    assert not missing(page, opening, names)
    assert missing(page, opening, {*names, "no_such_choice"}) == {"no_such_choice"}


def test_every_method_has_a_row() -> None:
    """The README's two tables of methods, for prompts and for baselines, hold every method."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, re.MULTILINE)
    assert {*get_args(MethodName)} <= {name for row in rows for name in re.findall(r"\w+", row)}


def test_every_verb_is_in_the_readme() -> None:
    """The README shows each verb that ``--help`` lists."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    verbs = [name for name, verb in get_command(app).commands.items() if not verb.hidden]
    shown = {*re.findall(r"\borchestrator ([\w-]+)", page), *re.findall(r"`([\w-]+)", page)}
    assert len(verbs) > 20
    assert not {*verbs} - shown
