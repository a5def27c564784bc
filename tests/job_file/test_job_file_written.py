"""A job spec that is written out is read back unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.errors import SpecError
from orchestrator.job.yaml import load_job, write
from orchestrator.job.yaml.scalars import compose
from orchestrator.job.yaml.tree import grow

labels = (
    st.text(max_size=6)
    | st.integers()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
)
numbers = st.from_regex(r"[-+]?\.?[0-9]{1,3}([.eE_x:][-+0-9]{0,3})?", fullmatch=True)

JOB = """
name: labels
base_model: {id: builtin:quickstart}
data:
  path: builtin:quickstart
  template: "{text}"
  target: label
"""


@given(st.dictionaries(labels | numbers, st.text(max_size=5) | numbers, max_size=4))
@example({"1e3": ".5e3"})
@example({"007": "1.10", "True": "~"})
def test_what_is_written_reads_back_in_its_type(document: dict[Any, str]) -> None:
    """A text that only YAML 1.2 would read as a number stays text, as a key and as a value."""
    node = compose(write(document))
    assert node is not None
    assert repr(grow(node, "file").plain()) == repr(document)


def load(folder: Path, text: str) -> Any:
    file = folder / "job.yaml"
    file.write_text(JOB + text)
    return load_job(file)


@pytest.mark.parametrize(
    ("key", "label"),
    [("007", "007"), ('"1"', "1"), ("1", 1), ("1.0", 1.0), ("yes", "yes"), ("True", True)],
)
def test_labels_are_as_the_file_spells_them(tmp_path: Path, key: str, label: Any) -> None:
    """Leading zeros make a text, with or without quotes; a number with a point may be a label."""
    found = load(tmp_path, f'  verbalizer: {{{key}: " a", other: " b"}}\n').data.verbalizer
    assert [(type(it), it) for it in found] == [(type(label), label), (str, "other")]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            '1: " a", "1": " b"',
            "1 and \"1\" are the same label, with the texts ' a' and ' b'; keep one of them",
        ),
        ('true: " a", "true": " b"', 'true and "true" are the same label'),
        ('"1": " a", "1.0": " b"', '"1" and "1.0" are the same label'),
        ('1: " a", 1.0: " b"', "is given twice, first as 1 on line 8"),
    ],
)
def test_a_label_that_is_named_twice_is_reported_in_both_spellings(
    tmp_path: Path, keys: str, message: str
) -> None:
    with pytest.raises(SpecError) as caught:
        load(tmp_path, f"  verbalizer: {{{keys}}}\n")
    assert message in str(caught.value) and "data.verbalizer" in str(caught.value)


def test_two_spellings_with_one_text_are_no_conflict(tmp_path: Path) -> None:
    """A spec may name the labels of two formats if their texts agree."""
    verbalizer = {0: " no", "0": " no", 1: " yes", "1": " yes"}
    assert (
        load(
            tmp_path, f"  verbalizer: {yaml.safe_dump(verbalizer, default_flow_style=True)}"
        ).data.verbalizer
        == verbalizer
    )
