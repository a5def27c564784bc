"""Text metrics: computed by hand, by the libraries directly, and for arbitrary texts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from orchestrator.tuning.text_metrics import f1, text_metrics, words

NAMES = {"bleu", "rouge_1", "rouge_2", "rouge_l", "f1", "exact_text"}
TEXTS = [
    "The Blue Spice is a cheap coffee shop near the river .",
    "It serves English food.",
    "",
    "cafés über alles",
]
REFERENCES = [
    [
        "The Blue Spice is a coffee shop by the river.",
        "A cheap coffee shop near the river is Blue Spice.",
    ],
    ["It serves English food."],
    ["Clowns is a pub.", "Clowns, a pub.", "A pub: Clowns."],
    ["cafés under all", ""],
]

texts = st.text(max_size=40) | st.sampled_from(
    ["", " ", "the", "a b c d e", "A b, c d e!", "\u2028", "日本 語", "\x00"]
)
rows = st.lists(st.tuples(texts, st.lists(texts, min_size=1, max_size=3)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("text", "reference", "wanted"),
    [
        ("the cat sat", "cat sat down", 2 * 2 / (2 + 3)),  # the article does not count
        ("a A an The", "the", 1.0),  # no words are left on either side
        ("", "", 1.0),
        ("", "word", 0.0),
        ("word", "!?", 0.0),
        (
            "Yes, yes!",
            "yes",
            2 * 1 / (2 + 1),
        ),  # a repeated word counts as often as it is in the other text
        ("über-cool", "Übercool", 1.0),
        ("theatre", "the atre", 0.0),  # articles are whole words
        ("no", "yes", 0.0),
    ],
)
def test_f1_by_hand(text: str, reference: str, wanted: float) -> None:
    """f1 is SQuAD's: normalized, twice the common words over all words, with its empty rule."""
    assert f1(text, reference) == pytest.approx(wanted)


def test_words_are_split_at_white_space() -> None:
    """Punctuation is removed without a gap; an article leaves a gap."""
    assert words("The don't-care  of\nA  B.") == ["dontcare", "of", "b"]


def test_rouge_and_exact_text_by_hand() -> None:
    """Each metric takes its better reference for each row; the result is the mean over rows."""
    got = text_metrics(["a b c d", "x"], [["a b x y", "d c b a"], ["y", "x"]])
    assert got["rouge_1"] == pytest.approx((1 + 1) / 2)  # "d c b a" has all the words
    assert got["rouge_2"] == pytest.approx(
        (1 / 3 + 0) / 2
    )  # "a b" is one of three pairs; a single word has no pair
    assert got["rouge_l"] == pytest.approx((2 / 4 + 1) / 2)
    assert got["exact_text"] == 0.5


def test_bleu_by_hand() -> None:
    """BLEU is the geometric mean of the precisions 4/5, 3/4, 2/3 and 1/2.

    The text and its reference have five words each.
    """
    got = text_metrics(["one two three four five"], [["one two three four six"]])["bleu"]
    assert got == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))


def test_a_short_text_pays_in_bleu() -> None:
    """Four right words for a reference of eight get the brevity penalty exp(1 - 8/4)."""
    got = text_metrics(["b c d e"], [["b c d e f g h i"]])["bleu"]
    assert got == pytest.approx(2.718281828459045 ** (1 - 8 / 4))


def test_a_perfect_corpus_scores_one() -> None:
    """Texts equal to one of their references score 1 in every metric, also to the last one."""
    wanted = [
        ["something else entirely here", line]
        for line in ("one two three four", "five six seven eight nine")
    ]
    assert text_metrics([row[1] for row in wanted], wanted) == pytest.approx(
        dict.fromkeys(NAMES, 1.0)
    )


def test_the_libraries_say_the_same() -> None:
    """BLEU and ROUGE agree with sacreBLEU and rouge-score called directly.

    Rows have one to three references.
    """
    got = text_metrics(TEXTS, REFERENCES)
    streams = [
        [row[place] if place < len(row) else None for row in REFERENCES] for place in range(3)
    ]
    assert got["bleu"] == pytest.approx(BLEU().corpus_score(TEXTS, streams).score / 100)  # type: ignore[arg-type]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    for ours, theirs in {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}.items():
        best = [
            max(scorer.score(one, text)[theirs].fmeasure for one in row)
            for text, row in zip(TEXTS, REFERENCES, strict=True)
        ]
        assert got[ours] == pytest.approx(sum(best) / len(best))
    assert 0 < got["bleu"] < 1 and 0 < got["rouge_l"] < 1


@given(rows=rows)
@settings(max_examples=150, deadline=None)
def test_any_texts_have_metrics_between_0_and_1(rows: list[tuple[str, list[str]]]) -> None:
    """Every metric is between 0 and 1, also for Unicode, control characters and empty texts."""
    got = text_metrics([text for text, _ in rows], [references for _, references in rows])
    assert got.keys() == NAMES
    assert all(0 <= value <= 1 for value in got.values())


@given(rows=rows, more=texts)
@settings(max_examples=100, deadline=None)
def test_order_and_further_references_of_a_row(
    rows: list[tuple[str, list[str]]], more: str
) -> None:
    """The order of a row's references does not matter.

    A further reference never lowers a metric that takes the best one.
    """
    made, references = [text for text, _ in rows], [row for _, row in rows]
    first = text_metrics(made, references)
    assert text_metrics(made, [row[::-1] for row in references]) == pytest.approx(first)
    grown = text_metrics(made, [[more, *references[0]], *references[1:]])
    assert all(grown[name] >= first[name] - 1e-12 for name in NAMES - {"bleu"})


@given(rows=rows)
@settings(max_examples=60, deadline=None)
def test_a_text_that_is_a_reference_is_exact(rows: list[tuple[str, list[str]]]) -> None:
    """When each text is its row's first reference, exact_text and f1 are 1."""
    references = [row for _, row in rows]
    got = text_metrics([row[0] for row in references], references)
    assert got["exact_text"] == got["f1"] == 1


@pytest.mark.parametrize(
    ("made", "references"), [([], []), (["a"], []), (["a"], [[]]), (["a", "b"], [["a"], []])]
)
def test_every_text_needs_a_reference(made: list[str], references: list[list[str]]) -> None:
    """No rows, or a row without a reference, raises ValueError."""
    with pytest.raises(ValueError, match="every text needs a reference"):
        text_metrics(made, references)
