"""What is left of an error that stands within a message of ours: one line, without secrets."""

from __future__ import annotations

import pytest

from orchestrator.utils.text import MAX_LINE, first_line, last_line


@pytest.mark.parametrize("message", ["", "  \n "])
def test_an_error_without_a_message_is_named_by_its_type(message: str) -> None:
    """No message of an error is too short for the line that quotes it."""
    error = ValueError(message)
    assert {first_line(error), last_line(error), first_line(error, with_type=True)} == {
        "ValueError"
    }


def test_one_line_is_quoted() -> None:
    """Blank lines around the message and spaces around the line are left out."""
    error = OSError("\n no such file \n at line 3\n")
    assert first_line(error) == first_line(str(error)) == "no such file"
    assert first_line(error, with_type=True) == "OSError: no such file"
    assert last_line(error) == "at line 3"


@pytest.mark.parametrize("length", [MAX_LINE - 20, MAX_LINE + 20])
def test_a_secret_does_not_survive_the_cut(length: int) -> None:
    """A password is hidden also where the end of the line would cut its address in two."""
    shown = first_line(ValueError("x" * length + " postgresql://ann:s3cr3t@host/db"))
    assert len(shown) <= MAX_LINE and "ann" not in shown and "s3c" not in shown
