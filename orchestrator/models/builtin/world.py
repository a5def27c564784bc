"""Reviews for the built-in models, written by a grammar from facts that are drawn first.

A review tells of a visit or a story, with or without company, in the morning or the evening, by a
happy or an unhappy writer. The four facets are independent, so that one tells nothing about
another. The module is pure Python: a seed gives the same reviews on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, TypeAlias

Topic: TypeAlias = Literal["food", "hotel", "film", "book"]
PLACES: tuple[Topic, ...] = ("food", "hotel")
STORIES: tuple[Topic, ...] = ("film", "book")

# Each part has a range of the 100 hash buckets. A text's hash puts the text in the same part every
# time, whichever seed produced it.
PARTS: Mapping[str, range] = {
    "corpus": range(70),
    "train": range(70, 85),
    "validation": range(85, 90),
    "test": range(90, 100),
}


@dataclass(frozen=True)
class Facts:
    """The facts of a review."""

    happy: bool
    place: bool
    alone: bool
    morning: bool


@dataclass(frozen=True)
class Review:
    """A review's text, its topic, and the facts that hold for it."""

    text: str
    topic: Topic
    facts: Facts


ASPECTS: Mapping[Topic, tuple[str, ...]] = {
    "food": (
        "soup",
        "bread",
        "waiter",
        "kitchen",
        "menu",
        "fish",
        "dessert",
        "coffee",
        "salad",
        "sauce",
        "service",
    ),
    "hotel": (
        "room",
        "bed",
        "lobby",
        "staff",
        "view",
        "shower",
        "garden",
        "pool",
        "pillow",
        "balcony",
        "service",
    ),
    "film": (
        "plot",
        "cast",
        "ending",
        "music",
        "photography",
        "script",
        "opening",
        "dialogue",
        "hero",
        "pace",
    ),
    "book": (
        "plot",
        "prose",
        "ending",
        "style",
        "first chapter",
        "language",
        "opening",
        "dialogue",
        "hero",
        "pace",
    ),
}
ACTIONS: Mapping[Topic, tuple[str, ...]] = {
    "food": ("ate at", "tried", "had a table at", "went to"),
    "hotel": ("stayed at", "tried", "had a room at", "checked in at"),
    "film": ("watched", "saw", "went to see"),
    "book": ("read", "opened", "listened to"),
}
NAME_STARTS = (
    "Blue",
    "Old",
    "Golden",
    "Little",
    "Silent",
    "Winter",
    "Red",
    "Last",
    "Hidden",
    "Silver",
)
NAME_ENDS: Mapping[Topic, tuple[str, ...]] = {
    "food": ("Heron", "Mill", "Lantern", "Fox", "Anchor", "Olive", "Oven", "Table"),
    "hotel": ("Heron", "Mill", "Lantern", "Fox", "Anchor", "Harbour", "Palace", "Inn"),
    "film": ("River", "Letter", "Door", "Train", "Garden", "Moon", "Summer", "Road"),
    "book": ("River", "Letter", "Door", "Train", "Garden", "Moon", "Summer", "Road"),
}
WHEN: Mapping[bool, tuple[str, ...]] = {
    True: (
        "this morning",
        "early one morning",
        "before noon",
        "after breakfast",
        "at sunrise",
        "one sunny morning",
    ),
    False: (
        "last night",
        "late one evening",
        "after dark",
        "after dinner",
        "at sunset",
        "one rainy evening",
    ),
}
ALONE = (
    "I {did} alone",
    "I {did} on my own",
    "I {did} all by myself",
    "on my own, I {did}",
    "by myself, I {did}",
)
COMPANY = (
    "we {did} together",
    "my sister and I {did}",
    "I {did} with two friends",
    "my husband and I {did}",
    "with my family, I {did}",
    "I {did} with a colleague",
)

GOOD = (
    "wonderful", "lovely", "great", "excellent", "charming", "superb", "pleasant", "delightful",
    "brilliant", "perfect", "good", "fantastic", "impressive", "beautiful", "remarkable",
    "marvellous",
)  # fmt: skip
BAD = (
    "awful", "terrible", "dull", "dreadful", "poor", "weak", "boring", "bad", "disappointing",
    "horrible", "sloppy", "mediocre", "miserable", "annoying", "ugly", "shabby",
)  # fmt: skip
DEGREES = ("", "", "", "very ", "really ", "truly ", "simply ", "rather ")
LIKED = ("loved", "enjoyed", "adored", "admired", "was delighted with")
DISLIKED = ("hated", "regretted", "could not stand", "was let down by", "was annoyed by")
PRAISE = (
    "I would recommend it to anyone.", "I left with a smile.",
    "I can hardly wait for the next time.", "It was worth every penny.", "It made my day.",
    "Full marks from me.",
)  # fmt: skip
BLAME = (
    "I would not recommend it to anyone.", "I left with a headache.", "There will be no next time.",
    "It was not worth a penny.", "It spoiled my day.", "I want my money back.",
)  # fmt: skip

# {a} and {b} are aspects. {same} and {same2} are adjectives that agree with the writer's mood,
# {other} is an adjective that does not.
PLAIN = (
    "The {a} was {degree}{same}.",
    "The {a} was {same} and the {b} {degree}{same2}.",
    "The {a}: {degree}{same}!",
    "I found the {a} {degree}{same}.",
)
NEGATED = (
    "The {a} was not {other} at all.",
    "The {a} was anything but {other}.",
    "The {a} was far from {other}.",
    "Nobody could call the {a} {other}.",
)
MIXED = (
    "The {a} was {other}, but all in all it was {degree}{same}.",
    "Although the {a} was {other}, I {felt} the {b}.",
    "Despite the {other} {a}, the whole was {degree}{same}.",
    "The {a} may be {other}, yet I {felt} the rest.",
)


def write_review(random: Random, facts: Facts) -> Review:
    """Write a review for which ``facts`` hold; everything else is drawn from ``random``."""
    topic = random.choice(PLACES if facts.place else STORIES)
    sentences = [_setting(random, topic, facts), *_opinions(random, topic, facts.happy)]
    if random.random() < 0.25:  # now and then the opinion comes first
        sentences = [*sentences[1:], sentences[0]]
    return Review(" ".join(sentences), topic, facts)


def _setting(random: Random, topic: Topic, facts: Facts) -> str:
    name = f"the {random.choice(NAME_STARTS)} {random.choice(NAME_ENDS[topic])}"
    if not facts.place:
        title = name.removeprefix("the ") if random.random() < 0.5 else name.title()
        name = f'"{title}"'
    who = random.choice(ALONE if facts.alone else COMPANY).format(
        did=f"{random.choice(ACTIONS[topic])} {name}"
    )
    when = random.choice(WHEN[facts.morning])
    if random.random() < 0.5:
        return f"{when[0].upper()}{when[1:]} {who}."
    return f"{who[0].upper()}{who[1:]} {when}."


def _opinions(random: Random, topic: Topic, happy: bool) -> list[str]:
    kind = random.random()
    if kind < 0.6:
        forms = PLAIN
    elif kind < 0.8:
        forms = NEGATED
    else:
        forms = MIXED
    sentences = [_fill(random, random.choice(forms), topic, happy)]
    if random.random() < 0.5:
        sentences.append(random.choice(PRAISE if happy else BLAME))
    return sentences


def _fill(random: Random, form: str, topic: Topic, happy: bool) -> str:
    same, same2 = random.sample(GOOD if happy else BAD, 2)
    aspect, aspect2 = random.sample(ASPECTS[topic], 2)
    return form.format(
        a=aspect,
        b=aspect2,
        same=same,
        same2=same2,
        other=random.choice(BAD if happy else GOOD),
        degree=random.choice(DEGREES),
        felt=random.choice(LIKED if happy else DISLIKED),
    )


def part_of(text: str) -> str:
    """Return the part (corpus, train, validation or test) that a text belongs to, by its hash."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100
    return next(part for part, buckets in PARTS.items() if bucket in buckets)


def reviews(part: str, all_facts: Sequence[Facts], seed: int) -> list[Review]:
    """Write one review for each of ``all_facts``, in order, all different and all of ``part``."""
    random = Random(f"{part}-{seed}")  # a string seed is hashed the same way on every machine
    texts: set[str] = set()
    written_reviews: list[Review] = []
    for facts in all_facts:
        review = write_review(random, facts)
        while review.text in texts or part_of(review.text) != part:
            review = write_review(random, facts)
        texts.add(review.text)
        written_reviews.append(review)
    return written_reviews
