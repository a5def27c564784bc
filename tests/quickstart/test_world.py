"""The quickstart's texts: reproducible, disjoint, balanced, and made without torch."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from dataclasses import astuple

import pytest

from orchestrator.errors import BadInput
from orchestrator.models.builtin import SPLIT_SIZES, TASKS, Recipe, quickstart_rows
from orchestrator.models.builtin.corpus import documents, every_facts
from orchestrator.models.builtin.world import part_of, reviews

# The digest belongs to Recipe.version. When it changes, raise the version too: caches are named by
# the recipe alone.
VERSION, CORPUS = 2, "822d45f76a1bf3e2"


def test_the_corpus_changes_only_with_its_version() -> None:
    """The same seed gives the same documents, bit for bit, on every machine."""
    text = repr(documents(300, seed=0))
    assert (Recipe().version, hashlib.sha256(text.encode()).hexdigest()[:16]) == (VERSION, CORPUS)


def test_another_seed_gives_other_documents_and_another_folder() -> None:
    """Another seed gives another corpus and another cache folder."""
    assert documents(20, seed=0) == documents(20, seed=0) != documents(20, seed=1)
    assert Recipe(seed=1).digest != Recipe().digest == Recipe().digest


def test_no_text_is_in_two_places() -> None:
    """Splits share no text with each other or with the language model's corpus, for any seed."""
    texts = [row["text"] for rows in quickstart_rows().values() for row in rows]
    corpus = {
        document.pieces[index].text for document in documents(3000, seed=0) for index in (0, 1)
    }
    assert len(set(texts)) == len(texts) == sum(SPLIT_SIZES.values())
    assert not corpus & set(texts)
    assert {part_of(review.text) for review in reviews("corpus", every_facts() * 20, seed=1)} == {
        "corpus"
    }


@pytest.mark.parametrize("task", TASKS)
def test_labels_are_balanced(task: str) -> None:
    """In each split of each task both labels have the same number of rows."""
    for split, rows in quickstart_rows(task).items():
        assert set(Counter(row["label"] for row in rows).values()) == {SPLIT_SIZES[split] // 2}


def test_facts_are_independent() -> None:
    """Every combination of facts is equally frequent, so that facts are independent."""
    found = {split: reviews(split, every_facts() * 4, seed=0) for split in SPLIT_SIZES}
    for split, size in SPLIT_SIZES.items():
        assert size % len(every_facts()) == 0
        assert set(Counter(astuple(review.facts) for review in found[split]).values()) == {4}


def test_an_unknown_task_is_refused_with_those_there_are() -> None:
    """The error lists the known tasks."""
    with pytest.raises(BadInput, match="sentiment, time"):
        quickstart_rows("weather")


def test_rows_need_no_torch() -> None:
    """Making the rows imports neither torch nor transformers."""
    code = (
        "import sys; from orchestrator.models.builtin import quickstart_rows; quickstart_rows(); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
