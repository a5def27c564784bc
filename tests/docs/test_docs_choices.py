"""The pages that list choices, methods and variables name every one of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from orchestrator.job.space import INIT_FIELDS
from orchestrator.job.spec import MethodName, NamedInit, Optimizer, Schedule, Scheduler, Searcher

ROOT = Path(__file__).parents[2]
INITS = {*get_args(NamedInit), *INIT_FIELDS}
LISTS: dict[str, tuple[str, str, set[str]]] = {
    "inits": ("docs/methods.md", "Inits are ", INITS),
    "searchers": ("docs/searches.md", "`search.searcher` is ", {*get_args(Searcher)}),
    "schedulers": ("docs/searches.md", "`search.scheduler` is ", {*get_args(Scheduler)}),
    "optimisers": ("docs/methods.md", "`train` has `optimizer` (", {*get_args(Optimizer)}),
    "schedules": ("docs/methods.md", "`schedule` (", {*get_args(Schedule)}),
}
"""The page, the words that its list follows, and the names that have to be in that list."""
INTERNAL = {"ORCHESTRATOR_SEARCH", "ORCHESTRATOR_LABELS"}
"""Variables that `submit` sets for the job on the cluster."""


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


@pytest.mark.parametrize("file", ["README.md", "docs/methods.md"])
def test_every_method_has_a_row(file: str) -> None:
    """The tables of methods, for prompts and for baselines, hold every method."""
    page = (ROOT / file).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+)[^|`]* \|", page, re.MULTILINE)
    assert {*get_args(MethodName)} <= {name for row in rows for name in re.findall(r"\w+", row)}


def test_every_variable_of_the_project_is_on_the_page_of_settings() -> None:
    """The page names each variable of the environment that the package reads for its users."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    modules = (ROOT / "orchestrator").rglob("*.py")
    read = {
        name
        for module in modules
        for name in re.findall(r"\bORCHESTRATOR_[A-Z_]+\b", module.read_text(encoding="utf-8"))
    }
    assert read - INTERNAL <= {*re.findall(r"`(ORCHESTRATOR_[A-Z_]+)`", page)}
