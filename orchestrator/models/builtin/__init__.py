"""The built-in models and data, made on the spot so that a first run needs no network.

The quickstart is a small language model with a task; it stands in for a model from the hub. For the
papers' experiments there is also a ladder of smaller and larger models of three families, with
harder tasks. One real chat model, SmolLM2, is converted from a Python package. Importing this
package imports neither torch nor transformers.
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
from orchestrator.models.builtin.smollm2 import SMOLLM2, check_smollm2, smollm2_model
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
    "builtin_has_chat_template",
    "builtin_model",
    "builtin_rows",
    "cache_folder",
    "check_builtin",
    "quickstart_model",
    "quickstart_rows",
]

BUILTIN_MODELS = ("quickstart", *RUNGS, SMOLLM2)
BUILTIN_DATA = ("quickstart", *(f"reviews-{task}" for task in LABEL_TASKS))

# Multiples of sixteen, the number of combinations of facts. Each combination then occurs equally
# often, so no fact helps to predict another one.
SPLIT_SIZES = {"train": 2000, "validation": 192, "test": 400}
# For each task: the question about a review, the label for yes, and the label for no.
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
    """Return the quickstart's labelled reviews by split: ``{"text": ..., "label": ...}``.

    The labels are balanced. No text is in two splits or in the language model's training data.
    Raises BadInput for an unknown task.
    """
    if task not in TASKS:
        raise BadInput(
            f"the quickstart has no task {task!r}; it has {', '.join(TASKS)}", "choose one of these"
        )
    question, yes, no = TASKS[task]
    return {
        split: [
            {"text": review.text, "label": yes if getattr(review.facts, question) else no}
            for review in _reviews(split)
        ]
        for split in SPLIT_SIZES
    }


@cache
def _reviews(split: str) -> tuple[Review, ...]:
    """Write a split's reviews, in which each combination of facts occurs equally often."""
    kinds = every_facts()
    facts = [kinds[number % len(kinds)] for number in range(SPLIT_SIZES[split])]
    Random(split).shuffle(facts)
    return tuple(reviews(split, facts, seed=0))


def quickstart_model(progress: Progress | None = None, recipe: Recipe | None = None) -> Path:
    """Return the folder of the quickstart language model, trained now if it is not cached."""
    recipe = recipe or Recipe()
    return made_once(
        f"quickstart-{recipe.digest}",
        lambda folder, bar: make_language_model(folder, recipe, bar),
        "making the quickstart language model, once",
        progress,
    )


def builtin_model(name: str, progress: Progress | None = None) -> Path:
    """Return the folder of a built-in model: ``quickstart``, a model of the ladder, or SmolLM2.

    The model is trained or converted if it is not cached. Raises BadInput for another name, and if
    the package that carries the model is missing.
    """
    if name == "quickstart":
        return quickstart_model(progress)
    if name == SMOLLM2:
        return smollm2_model(progress)
    if name not in RUNGS:
        raise BadInput(
            f"there is no built-in model {name!r}", f"choose one of {', '.join(BUILTIN_MODELS)}"
        )
    return ladder_model(name, progress)


def check_builtin(name: str) -> None:
    """Raise BadInput if a built-in model is not cached and can't be made on this machine."""
    if name == SMOLLM2:
        check_smollm2()


def builtin_has_chat_template(name: str) -> bool | None:
    """Tell whether a built-in model has a chat template; return None for an unknown name."""
    return name == SMOLLM2 if name in BUILTIN_MODELS else None


def builtin_rows(name: str) -> dict[str, list[dict[str, str]]]:
    """Return labelled reviews by split: of ``quickstart``, or of the ladder task ``reviews-TASK``.

    The ladder's rows name the review's topic in ``source``. No text is in two splits or in the
    built-in models' training data. Raises BadInput for another name.
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
            {
                "text": review.text,
                "label": " ".join(words_of(review, facets)),
                "source": review.topic,
            }
            for review in _reviews(split)
        ]
        for split in SPLIT_SIZES
    }
