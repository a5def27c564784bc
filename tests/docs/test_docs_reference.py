"""The pages that are written from the code are current, and complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from reference_pages import COMMAND, DOCS, EXAMPLE, PAGES
from typer.main import get_command

from orchestrator.cli.entry import app
from orchestrator.job.metrics import names_of
from orchestrator.job.spec import JobSpec, Section, SpaceSpec, TrainSpec

ROOT = DOCS.parent
INDEX = DOCS / "README.md"


def test_the_command_writes_the_pages() -> None:
    """The command that messages name is a target of the Makefile, which runs the module."""
    target = COMMAND.removeprefix("make ")
    rule = re.search(rf"^{target}: .*\n\t(.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert rule and rule[1].endswith("python -m tests.reference_pages")


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_the_code_says(name: str) -> None:
    """A page in docs/ is the one that the code gives today."""
    committed = (DOCS / name).read_text(encoding="utf-8")
    assert committed == PAGES[name](), f"docs/{name} is not current: run {COMMAND}"


def test_the_example_is_a_job() -> None:
    """The job on top of the page is accepted as it stands."""
    job = JobSpec.model_validate(yaml.safe_load(EXAMPLE))
    assert job.name == "sms-spam" and EXAMPLE in (DOCS / "jobs.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("heading", "section"), [("search.space", SpaceSpec), ("train", TrainSpec)]
)
def test_a_section_lists_its_keys_in_order(heading: str, section: type[Section]) -> None:
    """Below the heading of a section stand all of its keys, in the order of the spec."""
    page = PAGES["jobs.md"]()
    text = re.split(rf"^#+ {re.escape(heading)}$", page, flags=re.MULTILINE)[1]
    keys = re.findall(r"^- `(\w+)`: ", re.split(r"^#", text, flags=re.MULTILINE)[0], re.MULTILINE)
    assert keys == list(section.model_fields)


def test_every_metric_is_on_the_page() -> None:
    """The choices of a registry are those of the page."""
    (entry,) = re.findall(r"^- `metric`: `.*?\n\n", PAGES["jobs.md"](), re.MULTILINE | re.DOTALL)
    assert [name for name in re.findall(r"`(\w+)`", entry) if name in names_of()][:-1] == names_of()


def test_every_verb_has_a_heading() -> None:
    """Each verb that ``--help`` lists has its place on the page of commands, and no other has."""
    verbs = {name for name, verb in get_command(app).commands.items() if not verb.hidden}  # type: ignore[attr-defined]
    headings = re.findall(r"^### (\S+)$", PAGES["commands.md"](), re.MULTILINE)
    assert len(headings) == len(verbs) and {*headings} == verbs


@pytest.mark.parametrize("name", PAGES)
def test_a_page_reads_as_text(name: str) -> None:
    """Prose has lines of at most 100 columns, and nothing in it would be taken for HTML."""
    page = (DOCS / name).read_text(encoding="utf-8")
    prose = [line for line in page.splitlines() if not line.startswith("|")]
    assert max(map(len, prose)) <= 100
    assert all(line.count("`") % 2 == 0 for line in prose if not line.startswith("```"))
    bare = re.sub(r"```.*?```|<!--.*?-->|`[^`\n]*`", "", page, flags=re.DOTALL)
    assert not re.search(r"<\w", bare)


def index_entries() -> list[str]:
    """Return the pages that the index lists, each with a line that says what it is for."""
    text = INDEX.read_text(encoding="utf-8")
    return re.findall(r"^\| \[[^\]]+\]\(([^)]+)\) \| \S.*\|$", text, re.MULTILINE)


def test_the_index_lists_every_page() -> None:
    """docs/README.md has one line for each page; folders with an index list their own pages."""
    pages: set[Path] = {*DOCS.glob("*.md"), *DOCS.glob("*/README.md")} - {INDEX}
    for folder in {page.parent for page in DOCS.glob("*/*.md")}:
        if not (folder / "README.md").exists():
            pages |= {*folder.glob("*.md")}
    expected = sorted(str(page.relative_to(DOCS)) for page in pages)
    assert sorted(entry for entry in index_entries() if not entry.startswith("../")) == expected
