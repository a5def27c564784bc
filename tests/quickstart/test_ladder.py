"""The ladder: models of three families, tiny ones here; jobs/ uses the real ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import BadInput
from orchestrator.models.backbone import Backbone, check_exact, load_backbone, weights_fingerprint
from orchestrator.models.builtin import (
    BUILTIN_DATA,
    BUILTIN_MODELS,
    SPLIT_SIZES,
    builtin_model,
    builtin_rows,
)
from orchestrator.models.builtin.labels import FACETS, TASKS, UNSEEN, WORDS, label_documents
from orchestrator.models.builtin.ladder import RUNGS, SENTINELS, Rung, ladder_model
from orchestrator.models.builtin.language_model import Row
from orchestrator.models.builtin.objectives import IGNORED, cut_in_two, masked, span_corrupted
from orchestrator.models.source import ModelSource

TINY = Rung(
    documents=160, hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=16
)
FAMILIES = {"causal": "causal", "encdec": "seq2seq", "masked": "masked"}
LABEL, TEXT, END, BEGIN, MASK = 8.0, 0.2, 1, 0, 3
SENTINEL_IDS = list(range(900, 930))
rows = st.lists(
    st.tuples(st.integers(10, 800), st.sampled_from([LABEL, TEXT, TEXT, TEXT])),
    min_size=4,
    max_size=60,
).map(
    lambda pairs: Row(
        [token for token, _ in [*pairs, (10, TEXT)]], [weight for _, weight in [*pairs, (10, TEXT)]]
    )
)
seeds = st.integers(0, 1000).map(Random)


def made(folder: Path) -> Backbone:
    return load_backbone(ModelSource(folder.name, "main", folder))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_rung_is_an_ordinary_model_of_its_family(cache: Path, kind: str) -> None:
    """A rung loads as any model folder, can be tuned exactly, and encodes any text."""
    steps: list[tuple[int, int]] = []
    rung = replace(TINY, kind=kind)
    folder = ladder_model(f"{kind}-tiny", lambda *step: steps.append(step), rung)
    assert steps == [(step, 10) for step in range(1, 11)] and folder.parent == cache
    backbone = made(folder)
    check_exact(backbone)
    assert backbone.family == FAMILIES[kind] and backbone.info.context_length >= 300
    ids = backbone.tokenizer("Zoë paid 3 €").input_ids
    assert backbone.tokenizer.decode(ids, skip_special_tokens=True) == "Zoë paid 3 €"
    assert ladder_model(f"{kind}-tiny", lambda *_: pytest.fail("trained again"), rung) == folder


def test_the_same_recipe_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines make the same weights, bit for bit."""
    found = []
    for name in ("one", "other"):
        monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / name))
        folder = ladder_model(
            "encdec-tiny", lambda *_: None, replace(TINY, kind="encdec", documents=48)
        )
        found.append(weights_fingerprint(ModelSource(name, "main", folder)))
    assert found[0] == found[1]


def test_adaptation_goes_on_from_the_model_without_it(cache: Path) -> None:
    """The base model is made first; an adapted one has its tokenizer and other weights."""
    adapted = ladder_model(
        "encdec-tiny-lm5", lambda *_: None, replace(TINY, kind="encdec", adaptation_steps=5)
    )
    base = ladder_model(
        "encdec-tiny", lambda *_: pytest.fail("made twice"), replace(TINY, kind="encdec")
    )
    one, other = made(adapted), made(base)
    assert (
        one.info.fingerprint != other.info.fingerprint
        and one.info.tokenizer_digest == other.info.tokenizer_digest
    )


def test_a_sentinel_in_a_target_is_one_token(cache: Path) -> None:
    """A sentinel before an answer is one token, as the paper's middle setting needs."""
    backbone = made(
        ladder_model("encdec-tiny", lambda *_: None, replace(TINY, kind="encdec", documents=32))
    )
    ids = backbone.tokenizer(text_target=f"{SENTINELS[0]} food", add_special_tokens=False)[
        "input_ids"
    ]
    assert ids[0] == backbone.tokenizer.convert_tokens_to_ids(SENTINELS[0])
    assert ids[1:] == backbone.tokenizer(" food", add_special_tokens=False)["input_ids"]


def test_every_rung_has_a_name_and_a_recipe_of_its_own() -> None:
    """The ladder has three sizes of three families and adapted encoder-decoder models.

    No two share a folder.
    """
    assert (
        {f"{kind}-{size}" for kind in FAMILIES for size in "sml"} < set(RUNGS) < set(BUILTIN_MODELS)
    )
    assert len({rung.digest for rung in RUNGS.values()}) == len(RUNGS)
    sizes = [RUNGS[f"causal-{size}"].hidden_size for size in "sml"]
    assert sizes == sorted(set(sizes))


def test_unknown_names_are_refused_with_those_there_are() -> None:
    """Unknown names of models and of data sets are refused with the known ones."""
    with pytest.raises(BadInput, match="no built-in model 'causal-xl'") as left:
        builtin_model("causal-xl")
    assert "quickstart, causal-s" in left.value.hint
    with pytest.raises(BadInput, match="no built-in data set 'reviews-weather'") as left:
        builtin_rows("reviews-weather")
    assert "reviews-mood-topic" in left.value.hint


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_what_the_task_asks_for(task: str) -> None:
    """A label has one word of each facet of the task; combinations are about equally frequent."""
    found = builtin_rows(f"reviews-{task}")
    assert (
        f"reviews-{task}" in BUILTIN_DATA
        and {split: len(of) for split, of in found.items()} == SPLIT_SIZES
    )
    for row in found["train"]:
        assert all(
            word in WORDS[facet]
            for word, facet in zip(row["label"].split(), TASKS[task], strict=True)
        )
        assert row["source"] in WORDS["topic"]
    labels = [row["label"] for row in found["train"]]
    for label in set(labels):
        assert labels.count(label) > 0.8 * len(labels) / len(set(labels))


def test_the_corpus_never_asks_what_is_left_to_the_prompt() -> None:
    """Mood before topic is never an answer in the corpus, though topic before mood is.

    So both facets are known, and their order is left to the prompt.
    """
    kinds = {word: facet for facet in FACETS for word in WORDS[facet]}
    asked = set()
    for document in label_documents(4000, seed=0)[1000:]:
        words: list[str] = []
        for piece in (*document.pieces, None):
            if piece is not None and piece.answer:
                words.append(kinds[piece.text.strip()])
            elif words:
                asked.add(tuple(words))
                words = []
    assert UNSEEN not in asked and UNSEEN[::-1] in asked and {(facet,) for facet in FACETS} < asked


@given(rows, seeds)
def test_corrupted_spans_put_back_give_the_row(row: Row, random: Random) -> None:
    """Putting the target's spans in place of the sentinels restores the row."""
    pair = span_corrupted(random, row, LABEL, SENTINEL_IDS, END)
    assert len(pair.targets) == len(pair.weights) and pair.ids[-1] == pair.targets[-1] == END
    spans: dict[int, list[int]] = {}
    for token in pair.targets[:-1]:
        if token in SENTINEL_IDS:
            mark = token
            spans[mark] = []
        else:
            spans[mark].append(token)
    back = [token for entry in pair.ids[:-1] for token in spans.get(entry, [entry])]
    assert back == row.ids and list(spans) == sorted(spans) and all(spans.values())


@given(rows, seeds)
def test_a_cut_row_is_the_row_or_ends_behind_a_label(row: Row, random: Random) -> None:
    """Input and target together are a beginning of the row.

    It is the whole row, or it ends with a label.
    """
    pair = cut_in_two(random, row, LABEL, END)
    whole = [*pair.ids[:-1], *pair.targets[:-1]]
    assert whole == row.ids[: len(whole)] and len(pair.ids) > 1 and len(pair.targets) > 1
    assert len(whole) == len(row.ids) or row.weights[len(whole) - 1] == LABEL


@given(rows, seeds)
def test_masks_hide_what_is_to_be_said(row: Row, random: Random) -> None:
    """A position with a target has a mask; any other has its own token."""
    pair = masked(random, row, LABEL, BEGIN, END, MASK)
    assert len(pair.ids) == len(pair.targets) == len(pair.weights) == len(row.ids) + 2
    for token, target, own in zip(pair.ids[1:-1], pair.targets[1:-1], row.ids, strict=True):
        assert (token, target) in ((MASK, own), (own, IGNORED))


@pytest.mark.long
@pytest.mark.parametrize("name", ["causal-s", "encdec-s-lm25", "masked-s"])
def test_labels_are_one_token(name: str) -> None:
    """In a real rung of each family a label is one token, so that one mask can hold it."""
    backbone = made(builtin_model(name))
    for word in (word for words in WORDS.values() for word in words):
        assert len(backbone.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
