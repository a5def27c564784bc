"""The records of docs/decisions/: their form, the index, and what they link to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "decisions"
INDEX = FOLDER / "README.md"
RECORDS = sorted(path for path in FOLDER.glob("*.md") if path != INDEX)
PAGES = [INDEX, *RECORDS]
BASES = (ROOT, ROOT / "orchestrator")  # a record names a file from either

TITLE = re.compile(r"# (\d{4})\. (.+)")
ACCEPTED = re.compile(
    r"Status: accepted, 20\d\d-\d\d-\d\d(, supersedes \[\d{4}\]\((?P<old>[^)]+)\))?"
)
SUPERSEDED = re.compile(r"Status: superseded by \[\d{4}\]\((?P<new>[^)]+)\), 20\d\d-\d\d-\d\d")
LINK = re.compile(r"\[[^\]]+\]\(([^)#]+)[^)]*\)")
NAMED_FILE = re.compile(r"`([\w.-]+/[\w/.-]+\.(?:py|yaml))`")
ROW = re.compile(r"\| \[(\d{4})\]\(([^)]+)\) \| ([^|]+) \| ([^|]+) \| [^|]+ \|")


def name(path: Path) -> str:
    """Return the name of a record, for the name of its test."""
    return path.name


def status_line(record: Path) -> str:
    """Return the line that says whether the decision still holds."""
    return record.read_text(encoding="utf-8").splitlines()[2]


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_a_record_has_its_number_a_status_and_three_sections(record: Path) -> None:
    """Each section has a text, and the number is that of the file's name."""
    text = record.read_text(encoding="utf-8")
    title = TITLE.fullmatch(text.splitlines()[0])
    assert title and title[1] == record.name[:4]
    status = status_line(record)
    assert ACCEPTED.fullmatch(status) or SUPERSEDED.fullmatch(status), status
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    assert parts[1::2] == ["Context", "Decision", "Consequences"]
    assert all(part.strip() for part in parts[2::2])


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_a_record_is_short(record: Path) -> None:
    """At most 60 lines of at most 100 columns."""
    lines = record.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert [line for line in lines if len(line) > 100] == []


def test_the_index_lists_every_record_in_order() -> None:
    """Numbers have no gap; title and status are those of the record."""
    rows = ROW.findall(INDEX.read_text(encoding="utf-8"))
    assert [file for _, file, _, _ in rows] == [record.name for record in RECORDS]
    assert [int(number) for number, *_ in rows] == list(range(1, len(RECORDS) + 1))
    for (number, _, title, status), record in zip(rows, RECORDS, strict=True):
        heading = record.read_text(encoding="utf-8").splitlines()[0]
        assert heading == f"# {number}. {title}"
        stated = re.sub(r"\[(\d{4})\]\([^)]+\)", r"\1", status_line(record))
        assert stated.removeprefix("Status: ").split(",")[0] == status


def test_a_superseded_record_and_its_successor_name_each_other() -> None:
    """The successor of each superseded record says which record it supersedes, and the reverse."""
    forward = set()
    backward = set()
    for record in RECORDS:
        status = status_line(record)
        if superseded := SUPERSEDED.fullmatch(status):
            forward.add((record.name, superseded["new"]))
        elif (accepted := ACCEPTED.fullmatch(status)) and accepted["old"]:
            backward.add((accepted["old"], record.name))
    assert forward
    assert forward == backward


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_a_record_links_to_and_the_files_it_names_exist(page: Path) -> None:
    """Links are relative to the record; files are named from the root or from the package."""
    text = page.read_text(encoding="utf-8")
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []
    named = NAMED_FILE.findall(text)
    assert [file for file in named if not any((base / file).exists() for base in BASES)] == []


def test_nothing_mentions_a_record_that_is_not_there() -> None:
    """Documents, code and tests name records by paths that exist."""
    mention = re.compile(r"decisions/\d{4}-[\w-]+\.md")
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    files += [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "cluster").glob("*.md")]
    files += [*(ROOT / "orchestrator").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for file in files:
        for path in mention.findall(file.read_text(encoding="utf-8")):
            assert (ROOT / "docs" / path).exists(), f"{file}: {path}"
