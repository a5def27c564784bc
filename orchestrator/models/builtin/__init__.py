"""The quickstart: a small language model and a task, both made on the spot, so that the first run needs no network.

It is a stand-in for a hub model. Beside it there is a ladder of smaller and larger models of three families, with
harder tasks, for the papers' experiments. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random

from orchestrator.errors import BadInput
from orchestrator.models.builtin.corpus import ANSWER_MARK, NO, YES, Question, every_facts
from orchestrator.models.builtin.labels import TASKS as LABEL_TASKS
from orchestrator.models.builtin.labels import words_of
from orchestrator.models.builtin.ladder import RUNGS, ladder_model
from orchestrator.models.builtin.language_model import Recipe, make_language_model
from orchestrator.models.builtin.making import Progress, cache_folder, made_once
from orchestrator.models.builtin.world import Review, reviews

__all__ = [
    "BUILTIN_DATA",
    "BUILTIN_MODELS",
    "INSTRUCTIONS",
    "SPLIT_SIZES",
    "TASKS",
    "TEMPLATE",
    "VERBALIZER",
    "Recipe",
    "builtin_model",
    "builtin_rows",
    "cache_folder",
    "quickstart_model",
    "quickstart_rows",
]

BUILTIN_MODELS = ("quickstart", *RUNGS)
BUILTIN_DATA = ("quickstart", *(f"reviews-{task}" for task in LABEL_TASKS))

# Multiples of sixteen, the combinations of facts: each is there equally often, so that no other fact helps a label.
SPLIT_SIZES = {"train": 2000, "validation": 192, "test": 400}
# Task to (what is asked of a review, label when it is so, label when it is not).
TASKS: dict[str, tuple[Question, str, str]] = {
    "sentiment": ("happy", "positive", "negative"),
    "time": ("morning", "morning", "evening"),
}

TEMPLATE = "{text}" + ANSWER_MARK
VERBALIZER = {"positive": YES, "negative": NO}
INSTRUCTIONS = (
    "Is the reviewer happy? Answer yes or no.",
    "Read the review and say whether the reviewer is happy.",
    "Decide whether the writer was happy with it.",
)


def quickstart_rows(task: str = "sentiment") -> dict[str, list[dict[str, str]]]:
    """Labelled reviews by split: ``{"text": ..., "label": ...}``, the labels balanced; BadInput for an unknown task.

    No text is in two splits, and none in what the language model was trained on.
    """
    if task not in TASKS:
        raise BadInput(
            f"the quickstart has no task {task!r}; it has {', '.join(TASKS)}", "choose one of these"
        )
    question, yes, no = TASKS[task]
    return {
        split: [
            {"text": it.text, "label": yes if getattr(it.facts, question) else no}
            for it in _reviews(split)
        ]
        for split in SPLIT_SIZES
    }


@cache
def _reviews(split: str) -> tuple[Review, ...]:
    kinds = every_facts()
    facts = [kinds[number % len(kinds)] for number in range(SPLIT_SIZES[split])]
    Random(split).shuffle(facts)
    return tuple(reviews(split, facts, seed=0))


def quickstart_model(progress: Progress | None = None, recipe: Recipe | None = None) -> Path:
    """Folder of the quickstart language model, trained when it is not in the cache yet."""
    recipe = recipe or Recipe()
    return made_once(
        f"quickstart-{recipe.digest}",
        lambda folder, shown: make_language_model(folder, recipe, shown),
        "making the quickstart language model, once",
        progress,
    )


def builtin_model(name: str, progress: Progress | None = None) -> Path:
    """Folder of a model that is made on the spot, ``quickstart`` or one of the ladder; BadInput for another name."""
    if name == "quickstart":
        return quickstart_model(progress)
    if name not in RUNGS:
        raise BadInput(
            f"there is no built-in model {name!r}", f"choose one of {', '.join(BUILTIN_MODELS)}"
        )
    return ladder_model(name, progress)


def builtin_rows(name: str) -> dict[str, list[dict[str, str]]]:
    """Labelled reviews by split: ``quickstart``, or a task of the ladder, ``reviews-TASK``; BadInput for another name.

    The ladder's rows say in ``source`` what the review is about. No text is in two splits, and none in what the
    built-in models were trained on.
    """
    if name == "quickstart":
        return quickstart_rows()
    if name not in BUILTIN_DATA:
        raise BadInput(
            f"there is no built-in data set {name!r}", f"choose one of {', '.join(BUILTIN_DATA)}"
        )
    facets = LABEL_TASKS[name.removeprefix("reviews-")]
    return {
        split: [
            {"text": it.text, "label": " ".join(words_of(it, facets)), "source": it.topic}
            for it in _reviews(split)
        ]
        for split in SPLIT_SIZES
    }
