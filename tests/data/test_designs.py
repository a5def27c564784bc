"""Prompt design: demonstrations at random or near the input, as many as fit, in any wording."""

from __future__ import annotations

from typing import Any

from models import tiny_tokenizer

from orchestrator.data.dataset import RowSplits
from orchestrator.data.designs import Design, Designs
from orchestrator.job.spec import DataSpec

TRAIN: list[dict[str, Any]] = [
    {"text": "the quick brown fox jumps", "label": 0},
    {"text": "a terrible movie", "label": 1},
    {"text": "great good bad", "label": 0},
    {"text": "the lazy dog jumps over the place", "label": 1},
]
ASKED: list[dict[str, Any]] = [
    {"text": "a lazy dog", "label": 1},
    {"text": "is this movie terrible?", "label": 0},
]
DATA = DataSpec(
    path="p",
    template="{text} is",
    target="label",
    verbalizer={0: " good", 1: " bad"},
    max_input_tokens=40,
)


def designs(context: int = 200) -> Designs:
    return Designs(DATA, RowSplits(TRAIN, ASKED, ASKED), tiny_tokenizer(), "causal", context)


def texts(design: Design, context: int = 200) -> list[str]:
    """Return the text that a model would read for each asked row."""
    return [
        tiny_tokenizer().decode(ids)
        for ids in designs(context).encoded(design, "validation").inputs
    ]


def test_without_demonstrations_the_row_stands_alone() -> None:
    """Zero-shot inputs use the data's template or another wording."""
    assert texts(Design()) == ["a lazy dog is", "is this movie terrible? is"]
    assert texts(Design("Judge: {text} A:")) == [
        "Judge: a lazy dog A:",
        "Judge: is this movie terrible? A:",
    ]


def test_random_demonstrations_are_the_same_for_all_rows_and_follow_from_the_seed() -> None:
    """Each label is shown equally often, and each demonstration has its answer."""
    first, second = texts(Design(shots=2))
    shown = first.removesuffix("a lazy dog is")
    assert (
        shown
        == second.removesuffix("is this movie terrible? is")
        == designs().text(Design(shots=2))
    )
    assert (shown.count(" is good\n\n"), shown.count(" is bad\n\n")) == (1, 1)
    assert len({designs().text(Design(shots=2, seed=seed)) for seed in range(6)}) > 1
    assert designs().shown(Design(shots=2), "test") == 2


def test_nearest_demonstrations_share_the_rows_words() -> None:
    """The nearest demonstration is right in front of the row, and depends on the row."""
    first, second = texts(Design(shots=1, demonstrations="nearest"))
    assert first == "the lazy dog jumps over the place is bad\n\na lazy dog is"
    assert second == "a terrible movie is bad\n\nis this movie terrible? is"
    both, _ = texts(Design(shots=2, demonstrations="nearest"))
    assert (
        both.endswith("the lazy dog jumps over the place is bad\n\na lazy dog is")
        and both.count("\n\n") == 2
    )


def test_demonstrations_end_where_the_context_does() -> None:
    """Fewer demonstrations than asked for are shown where the context is short.

    None is cut, and the number shown is reported. ``fits`` says beforehand whether any fits.
    """
    for way in ("random", "nearest"):
        design = Design(shots=4, demonstrations=way)
        few = designs(60)
        longest = max(len(ids) for ids in few.encoded(design, "validation").inputs)
        assert longest <= 60 and 0 < few.shown(design, "validation") < 4
        assert designs(400).shown(design, "validation") == 4
    assert (
        designs(60).fits(Design(shots=4))
        and not designs(20).fits(Design(shots=4))
        and designs(20).fits(Design())
    )


def test_a_designs_text_is_what_is_stored() -> None:
    """The stored bytes are the wording and the demonstrations.

    Nearest demonstrations need all training rows to be stored.
    """
    bare, random, nearest = (
        designs().stored_bytes(design)
        for design in (Design(), Design(shots=2), Design(shots=2, demonstrations="nearest"))
    )
    assert bare == len(DATA.template) and random == bare + len(designs().text(Design(shots=2)))
    assert nearest > random
