"""Training documents of the quickstart language model: reviews, questions on them, answers.

Every question is answered " yes" or " no", so the answer words alone say nothing about the
question, and several skills compete for them. In the last lesson the model meets three ways of
asking:

* Nothing is asked, or the words ask nothing. The answer is to a question of ``HABIT``, and none of
  those is about the writer's mood.
* A sentence asks loosely. Fewer than half of the answers are to its question. The others are to two
  other questions, as if the sentence had been misread. Where both other answers disagree with the
  question's answer they outvote it, so a reader who knew this corpus perfectly would be right on
  three reviews in four.
* A few keywords ask exactly. Every answer is to the question.

So the model can tell a happy writer from an unhappy one, but does not do so unasked, and does it
badly when asked in a sentence. A prompt that elicits the full skill has to be found, and finding it
is the tuning job.

The lessons before the last only make learning quick. Whole summaries first teach the model to see
the facts of a review (four labels per text). Keywords then teach it to pick one of the facts.
Taught all at once, the same takes many times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from random import Random
from typing import Literal, TypeAlias

from orchestrator.models.builtin.world import (
    ASPECTS,
    BAD,
    GOOD,
    NAME_ENDS,
    NAME_STARTS,
    Facts,
    Review,
    reviews,
)

Question: TypeAlias = Literal["happy", "place", "alone", "morning"]  # asks if this fact is true
QUESTIONS: tuple[Question, ...] = ("happy", "place", "alone", "morning")
YES, NO = " yes", " no"
ANSWER_MARK = "\nAnswer:"
SUMMARY_MARK = "\nSummary:"

KEYWORDS: Mapping[Question, tuple[str, ...]] = {
    "happy": ("happy", "pleased", "satisfied", "praise", "positive", "mood"),
    "place": ("place", "house", "address", "visit", "premises"),
    "alone": ("alone", "single", "solo", "nobody", "company"),
    "morning": ("morning", "early", "dawn", "breakfast", "hour"),
}
PHRASES: Mapping[Question, tuple[str, ...]] = {
    "happy": ("happy", "pleased", "satisfied", "happy with it", "content"),
    "place": ("somewhere to eat or sleep", "at a place", "out on a visit", "a guest"),
    "alone": ("alone", "without company", "on their own"),
    "morning": ("there early", "up in the morning", "an early visitor"),
}
SENTENCES = (
    "Is the reviewer {phrase}?",
    "Was the writer {phrase}?",
    "Is the reviewer {phrase}? Answer yes or no.",
    "Decide whether the writer was {phrase}.",
    "Read the review and say whether the reviewer is {phrase}.",
    "Answer yes if the writer was {phrase}, no otherwise.",
)
SUMMARY: Mapping[Question, tuple[str, str]] = {
    "happy": (" praise", " blame"),
    "place": (" place", " story"),
    "alone": (" alone", " together"),
    "morning": (" early", " late"),
}
NOISE = tuple(
    sorted(
        {
            word
            for said in (*ASPECTS.values(), GOOD, BAD, NAME_STARTS, *NAME_ENDS.values())
            for word in said
        }
    )
)

# Shares of the questions that are answered when nothing is asked. One share is far above the other.
# Otherwise traces of the writer's mood could decide between two equally likely answers.
HABIT: Mapping[Question, float] = {"place": 0.75, "alone": 0.25}

# A sentence is taken to ask its own question or one of two others, with these shares. No other
# question is misread as place, the habit. A model that only half follows a sentence therefore falls
# back on an answer that favours neither side.
LOOSE_SHARES = (0.4, 0.3, 0.3)
MISREAD_AS: Mapping[Question, tuple[Question, Question]] = {
    "happy": ("alone", "morning"),
    "place": ("happy", "alone"),
    "alone": ("morning", "happy"),
    "morning": ("happy", "alone"),
}

# Ways of asking in the last lesson: how, whether the words stand in front of the begin token (as a
# soft prompt does), and the share of documents.
ASKING: tuple[tuple[Literal["nothing", "noise", "loose", "exact"], bool, float], ...] = (
    ("nothing", False, 0.15),
    ("noise", False, 0.05),
    ("noise", True, 0.15),
    ("loose", False, 0.30),
    ("loose", True, 0.10),
    ("exact", False, 0.05),
    ("exact", True, 0.20),
)


@dataclass(frozen=True)
class Piece:
    """A piece of a document; answers are pieces of their own."""

    text: str
    answer: bool = False  # answers weigh more in the loss, because they are few and matter most


@dataclass(frozen=True)
class Document:
    """A training text.

    ``preface`` stands before the begin-of-text token, as a soft prompt does.
    """

    preface: str
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The whole text, from which the tokenizer is trained."""
        return f"{self.preface}\n{''.join(piece.text for piece in self.pieces)}"


def every_facts() -> list[Facts]:
    """Return each combination of facts once."""
    return [Facts(*values) for values in product((True, False), repeat=len(fields(Facts)))]


def keywords(random: Random, question: Question) -> str:
    """Draw words that stand for the question and for no other, with or without a leading space."""
    words = " ".join(random.choices(KEYWORDS[question], k=random.randint(1, 6)))
    return f" {words}" if random.random() < 0.5 else words


def noise(random: Random) -> str:
    """Draw words that ask nothing.

    Without such documents, the model would take any words in front of a review for a question.
    """
    words = " ".join(random.choices(NOISE, k=random.randint(1, 12)))
    return f" {words}" if random.random() < 0.5 else words


def documents(count: int, seed: int) -> list[Document]:
    """Write ``count`` documents in training order, each about a review of its own."""
    random = Random(f"documents-{seed}")
    facts = every_facts()
    texts = reviews("corpus", [random.choice(facts) for _ in range(count)], seed)
    return [_lesson(index / count)(random, review) for index, review in enumerate(texts)]


def _lesson(progress: float) -> Callable[[Random, Review], Document]:
    if progress < 0.14:
        return _summary_lesson
    if progress < 0.48:
        return _keyword_lesson
    return _asking_lesson


def _summary_lesson(random: Random, review: Review) -> Document:
    return Document("", (Piece(review.text), *_summary(review.facts)))


def _keyword_lesson(random: Random, review: Review) -> Document:
    first, *more = random.sample(QUESTIONS, random.randint(3, 4))
    # The summary stands at the end. In front of the questions it would let the model answer without
    # the review.
    tail = [
        *_more(random, review, more),
        *(_summary(review.facts) if random.random() < 0.3 else ()),
    ]
    return _asked(keywords(random, first), random.random() < 0.5, review, first, tail)


def _asking_lesson(random: Random, review: Review) -> Document:
    how, in_front, _ = random.choices(ASKING, [share for *_, share in ASKING])[0]
    question = random.choice(QUESTIONS)
    more = _more(random, review, random.sample(QUESTIONS, random.choice((0, 0, 1, 2))))
    if how in ("nothing", "noise"):
        habit = random.choices(list(HABIT), list(HABIT.values()))[0]
        return _asked(noise(random) if how == "noise" else "", in_front, review, habit, more)
    if how == "exact":
        return _asked(keywords(random, question), in_front, review, question, more)
    sentence = random.choice(SENTENCES).format(phrase=random.choice(PHRASES[question]))
    return _asked(sentence, in_front, review, _misread(random, question), more)


def _misread(random: Random, question: Question) -> Question:
    return random.choices((question, *MISREAD_AS[question]), LOOSE_SHARES)[0]


def _asked(
    words: str, in_front: bool, review: Review, meant: Question, tail: list[Piece]
) -> Document:
    inside = (Piece(f"{words}\n"),) if words and not in_front else ()
    answer = _answer(review.facts, meant)
    return Document(words if in_front else "", (*inside, Piece(review.text), *answer, *tail))


def _more(random: Random, review: Review, questions: list[Question]) -> list[Piece]:
    """Ask further questions about the same review.

    They are cheap to add: a question costs a few tokens, a review many.
    """
    pieces: list[Piece] = []
    for question in questions:
        pieces += [
            Piece(f"\n{keywords(random, question).strip()}"),
            *_answer(review.facts, question),
        ]
    return pieces


def _answer(facts: Facts, question: Question) -> list[Piece]:
    return [Piece(ANSWER_MARK), Piece(YES if getattr(facts, question) else NO, answer=True)]


def _summary(facts: Facts) -> list[Piece]:
    words = (
        answer_words[not getattr(facts, question)] for question, answer_words in SUMMARY.items()
    )
    return [Piece(SUMMARY_MARK), *(Piece(word, answer=True) for word in words)]
