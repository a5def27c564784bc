"""The ladder's tasks and corpus: reviews, and the words that label them.

The quickstart answers every question by yes or no. Here each facet of a review has words of its
own: two for the writer's mood, four for the review's topic, two for company, and two for the hour.
A document asks for one facet, or for two in a row, with keywords that include the labels' own
words. Or it asks for nothing, and the label is that of a facet in ``HABIT``. Mood followed by topic
is never asked for, so a prompt that elicits both in this order has to be found.

Tasks are ranked by the text that a model generates (``search.metric: exact_match``), as in the
papers.
"""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Literal, TypeAlias

from orchestrator.models.builtin.corpus import (
    ANSWER_MARK,
    NOISE,
    SUMMARY_MARK,
    Document,
    Piece,
    every_facts,
)
from orchestrator.models.builtin.world import Review, reviews

Facet: TypeAlias = Literal["mood", "topic", "company", "time"]
FACETS: tuple[Facet, ...] = ("mood", "topic", "company", "time")
WORDS: Mapping[Facet, tuple[str, ...]] = {
    "mood": ("praise", "blame"),
    "topic": ("food", "hotel", "film", "book"),
    "company": ("alone", "together"),
    "time": ("early", "late"),
}
KEYWORDS: Mapping[Facet, tuple[str, ...]] = {
    "mood": (*WORDS["mood"], "mood", "verdict", "opinion"),
    "topic": (*WORDS["topic"], "topic", "subject"),
    "company": (*WORDS["company"], "company", "people"),
    "time": (*WORDS["time"], "time", "hour", "day"),
}
# Shares of the facets that are answered when nothing is asked.
HABIT: Mapping[Facet, float] = {"company": 0.7, "time": 0.3}
UNSEEN: tuple[Facet, Facet] = ("mood", "topic")
TASKS: Mapping[str, tuple[Facet, ...]] = {
    **{facet: (facet,) for facet in FACETS},
    "mood-topic": UNSEEN,
}
"""The facets that each task asks for, by the name of the task."""

# The first quarter of the documents name all facets, which teaches the model to read reviews.
SUMMARIES = 0.25
# Numbers of facets that a document asks for, and their shares of the documents.
ASKING: tuple[tuple[int, float], ...] = ((0, 0.25), (1, 0.45), (2, 0.30))


def words_of(review: Review, facets: tuple[Facet, ...]) -> list[str]:
    """Return the review's label for each of the facets."""
    facts = review.facts
    true: Mapping[Facet, str] = {
        "mood": WORDS["mood"][not facts.happy],
        "topic": review.topic,
        "company": WORDS["company"][not facts.alone],
        "time": WORDS["time"][not facts.morning],
    }
    return [true[facet] for facet in facets]


def label_documents(count: int, seed: int) -> list[Document]:
    """Write ``count`` documents in training order, each about a review of its own."""
    random = Random(f"labels-{seed}")
    facts = every_facts()
    texts = reviews("corpus", [random.choice(facts) for _ in range(count)], seed)
    return [
        _summed_up(review) if index < SUMMARIES * count else _asked(random, review)
        for index, review in enumerate(texts)
    ]


def _summed_up(review: Review) -> Document:
    return Document("", (Piece(review.text), Piece(SUMMARY_MARK), *_words(review, FACETS)))


def _asked(random: Random, review: Review) -> Document:
    facets, words = _question(random)
    tail: list[Piece] = []
    # Further questions are cheap to add: a label costs a few tokens, a review many.
    for _ in range(random.choice((0, 0, 1, 2))):
        more_facets, more_words = _question(random, at_least=1)
        tail += [Piece(f"\n{more_words}"), Piece(ANSWER_MARK), *_words(review, more_facets)]
    spaced = f" {words}" if words and random.random() < 0.5 else words
    in_front = random.random() < 0.5
    inside = (Piece(f"{spaced}\n"),) if words and not in_front else ()
    pieces = (*inside, Piece(review.text), Piece(ANSWER_MARK), *_words(review, facets), *tail)
    return Document(spaced if in_front else "", pieces)


def _question(random: Random, at_least: int = 0) -> tuple[tuple[Facet, ...], str]:
    """Draw facets and the words that ask for them."""
    kinds = [(count, share) for count, share in ASKING if count >= at_least]
    count = random.choices([count for count, _ in kinds], [share for _, share in kinds])[0]
    if not count:
        noise = " ".join(random.choices(NOISE, k=random.randint(0, 8)))
        return (random.choices(list(HABIT), list(HABIT.values()))[0],), noise
    facets = tuple(random.sample(FACETS, count))
    while facets == UNSEEN:
        facets = tuple(random.sample(FACETS, count))
    words: list[str] = []
    for facet in facets:
        words += random.choices(KEYWORDS[facet], k=random.randint(1, 4))
    return facets, " ".join(words)


def _words(review: Review, facets: tuple[Facet, ...]) -> list[Piece]:
    return [Piece(f" {word}", answer=True) for word in words_of(review, facets)]
