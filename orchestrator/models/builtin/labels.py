"""The ladder's tasks and corpus: reviews, and the words that label them.

Where the quickstart answers every question by yes or no, here each facet of a review has words of its own: two for the
writer's mood, four for what the review is about, two for company, two for the hour. A document asks for one facet or
for two in a row, in keywords, among which are the labels' own words; or it asks for nothing, and the label is one of
``HABIT``. Mood and then topic are never asked in this order: who wants both in a prompt has to find out how.

Tasks are ranked by what a model writes of itself (``search.metric: exact_match``), as in the papers.
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
HABIT: Mapping[Facet, float] = {
    "company": 0.7,
    "time": 0.3,
}  # what is answered when nothing is asked
UNSEEN: tuple[Facet, Facet] = ("mood", "topic")
TASKS: Mapping[str, tuple[Facet, ...]] = {
    **{facet: (facet,) for facet in FACETS},
    "mood-topic": UNSEEN,
}
"""What is asked of a review, by the name of the task."""

SUMMARIES = 0.25  # share of documents, the first ones, that name all facets: they teach to read
ASKING: tuple[tuple[int, float], ...] = (
    (0, 0.25),
    (1, 0.45),
    (2, 0.30),
)  # facets asked for, and how often


def words_of(review: Review, facets: tuple[Facet, ...]) -> list[str]:
    """The review's label of each facet."""
    facts = review.facts
    true: Mapping[Facet, str] = {
        "mood": WORDS["mood"][not facts.happy],
        "topic": review.topic,
        "company": WORDS["company"][not facts.alone],
        "time": WORDS["time"][not facts.morning],
    }
    return [true[facet] for facet in facets]


def label_documents(count: int, seed: int) -> list[Document]:
    """``count`` documents in the order of reading, each on a review of its own."""
    random = Random(f"labels-{seed}")
    facts = every_facts()
    texts = reviews("corpus", [random.choice(facts) for _ in range(count)], seed)
    return [
        _summed_up(review) if place < SUMMARIES * count else _asked(random, review)
        for place, review in enumerate(texts)
    ]


def _summed_up(review: Review) -> Document:
    return Document("", (Piece(review.text), Piece(SUMMARY_MARK), *_words(review, FACETS)))


def _asked(random: Random, review: Review) -> Document:
    facets, words = _question(random)
    tail: list[Piece] = []
    for _ in range(random.choice((0, 0, 1, 2))):  # labels cost a few tokens each, a review many
        more, asked = _question(random, at_least=1)
        tail += [Piece(f"\n{asked}"), Piece(ANSWER_MARK), *_words(review, more)]
    spaced = f" {words}" if words and random.random() < 0.5 else words
    in_front = random.random() < 0.5
    inside = (Piece(f"{spaced}\n"),) if words and not in_front else ()
    pieces = (*inside, Piece(review.text), Piece(ANSWER_MARK), *_words(review, facets), *tail)
    return Document(spaced if in_front else "", pieces)


def _question(random: Random, at_least: int = 0) -> tuple[tuple[Facet, ...], str]:
    """Facets, and the words that ask for them."""
    kinds = [(count, share) for count, share in ASKING if count >= at_least]
    count = random.choices([count for count, _ in kinds], [share for _, share in kinds])[0]
    if not count:
        noise = " ".join(random.choices(NOISE, k=random.randint(0, 8)))
        return (random.choices(list(HABIT), list(HABIT.values()))[0],), noise
    asked = tuple(random.sample(FACETS, count))
    while asked == UNSEEN:
        asked = tuple(random.sample(FACETS, count))
    words = [
        word for facet in asked for word in random.choices(KEYWORDS[facet], k=random.randint(1, 4))
    ]
    return asked, " ".join(words)


def _words(review: Review, facets: tuple[Facet, ...]) -> list[Piece]:
    return [Piece(f" {word}", answer=True) for word in words_of(review, facets)]
