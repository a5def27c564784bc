"""The names on docs/structure.md: files, packages, and the functions of its journeys."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "orchestrator"
PAGE = (ROOT / "docs" / "structure.md").read_text(encoding="utf-8")
JOURNEYS = ("A job", "A submitted job", "A request")
HEADER = "| step | file | function | what happens |"
FILE = re.compile(r"[\w./-]+\.py\b")
PACKAGE_ROW = re.compile(r"^\| ((?:`[\w/.]+`(?:, )?)+) \|", re.MULTILINE)
NAME = re.compile(r"`([^`]+)`")
WORD = re.compile(r"^\| `(\w+)` \| `([\w/]+\.py)` \|", re.MULTILINE)


class Step(NamedTuple):
    """A row of a journey."""

    number: int
    file: str
    functions: list[str]


def section(page: str, heading: str) -> str:
    """Return the text below a heading of the second level, up to the next one."""
    _, _, rest = page.partition(f"## {heading}\n")
    return rest.split("\n## ")[0]


def tables(text: str) -> Iterator[list[Step]]:
    """Yield the steps of each table that has the columns of a journey."""
    for part in text.split(HEADER)[1:]:
        rows = part.split("\n\n")[0].strip().splitlines()[1:]
        cells = ([cell.strip() for cell in row.strip("|").split("|")] for row in rows)
        yield [
            Step(int(number), file.strip("`"), NAME.findall(functions))
            for number, file, functions, _ in cells
        ]


def steps(page: str) -> list[Step]:
    """Return the steps of all journeys."""
    return [
        step for heading in JOURNEYS for table in tables(section(page, heading)) for step in table
    ]


@lru_cache
def definitions(file: Path) -> frozenset[str]:
    """Return the functions and classes of a module, and methods as ``Class.method``."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, kinds):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{it.name}" for it in node.body if isinstance(it, kinds)}
    return frozenset(found)


def missing_files(page: str) -> list[str]:
    """List the files that the page names and that are in neither the package nor the project."""
    named = sorted(set(FILE.findall(page)))
    return [name for name in named if not any((top / name).is_file() for top in (PACKAGE, ROOT))]


def missing_functions(page: str) -> list[str]:
    """List the functions of the journeys that are not defined in the file of their row."""
    return [
        f"{step.number}: {step.file} {function}"
        for step in steps(page)
        for function in step.functions
        if not (PACKAGE / step.file).is_file() or function not in definitions(PACKAGE / step.file)
    ]


def test_every_file_is_there() -> None:
    """Paths are below the package, or below the project for those outside the package."""
    assert not missing_files(PAGE)


def test_every_function_is_defined_in_its_file() -> None:
    """Each row of a journey names at least one function, and its file defines it."""
    assert all(step.functions for step in steps(PAGE))
    assert not missing_functions(PAGE)


def test_every_word_for_a_trial_is_defined_in_its_file() -> None:
    """Each row of the table names a class and the file that defines it."""
    words = WORD.findall(section(PAGE, "The words for a trial"))
    assert len(words) > 10
    assert not [word for word, file in words if word not in definitions(PACKAGE / file)]


@pytest.mark.parametrize("heading", JOURNEYS)
def test_steps_are_numbered_without_gaps(heading: str) -> None:
    """A table may repeat the numbers of another one, for a variant of its steps."""
    numbers = [[step.number for step in table] for table in tables(section(PAGE, heading))]
    assert all(table == sorted(table) for table in numbers)
    known = {number for table in numbers for number in table}
    assert len(known) > 20
    assert known == set(range(1, len(known) + 1))


def test_the_table_of_packages_is_complete() -> None:
    """Every package and module at the top of the package has a row, and no row names another."""
    rows = PACKAGE_ROW.findall(section(PAGE, "Packages"))
    named = [name.rstrip("/") for row in rows for name in NAME.findall(row)]
    there = [
        it.name
        for it in PACKAGE.iterdir()
        if (it.is_dir() and (it / "__init__.py").is_file())
        or (it.suffix == ".py" and it.name != "__init__.py")
    ]
    assert sorted(named) == sorted(there)


def test_a_newcomer_meets_at_most_fourteen_packages_and_modules() -> None:
    """The top of the package stays small, apart from the files that mark a typed package."""
    there = {it.name for it in PACKAGE.iterdir()} - {"__pycache__", "__init__.py", "py.typed"}
    assert len(there) <= 14, sorted(there)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("`run_job`", "`run_jobs`"),
        ("`Broker.submit`", "`Broker.submits`"),
        ("`Broker.submit`", "`Seat.submit`"),
        ("`ServingEngine._loop`", "`_loop`"),
        ("`search/inputs.py`", "`search/prepare.py`"),
    ],
)
def test_a_wrong_function_would_be_noticed(right: str, wrong: str) -> None:
    """A function of another name, class or file is reported."""
    assert right in PAGE
    assert missing_functions(PAGE.replace(right, wrong))


def test_a_wrong_file_would_be_noticed() -> None:
    """A file that was moved is reported."""
    page = PAGE.replace("search/state/journal.py", "search/journal.py")
    assert missing_files(page) == ["search/journal.py"]
