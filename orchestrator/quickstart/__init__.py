"""The quickstart: a small language model and a task, both made on the spot, so that the first run needs no network.

It is a stand-in for a hub model. Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from random import Random

from orchestrator.errors import BadInput
from orchestrator.quickstart.corpus import ANSWER_MARK, NO, YES, Question, every_facts
from orchestrator.quickstart.language_model import Recipe, make_language_model
from orchestrator.quickstart.world import Review, reviews

__all__ = [
    "INSTRUCTIONS",
    "SPLIT_SIZES",
    "TASKS",
    "TEMPLATE",
    "VERBALIZER",
    "Recipe",
    "cache_folder",
    "quickstart_model",
    "quickstart_rows",
]

Progress = Callable[[int, int], None]

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
        raise BadInput(f"the quickstart has no task {task!r}; it has {', '.join(TASKS)}", "choose one of these")
    question, yes, no = TASKS[task]
    return {
        split: [{"text": it.text, "label": yes if getattr(it.facts, question) else no} for it in _reviews(split)]
        for split in SPLIT_SIZES
    }


@cache
def _reviews(split: str) -> tuple[Review, ...]:
    kinds = every_facts()
    facts = [kinds[number % len(kinds)] for number in range(SPLIT_SIZES[split])]
    Random(split).shuffle(facts)
    return tuple(reviews(split, facts, seed=0))


def cache_folder() -> Path:
    """$ORCHESTRATOR_CACHE, else prompt-orchestrator in the user's cache folder."""
    if own := os.environ.get("ORCHESTRATOR_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "prompt-orchestrator"


def quickstart_model(progress: Progress | None = None, recipe: Recipe | None = None) -> Path:
    """Folder of the quickstart language model, trained when it is not in the cache yet.

    Processes that ask at the same time wait for the one that trains. ``progress`` is told (steps done, steps in all);
    without it, standard error is.
    """
    from filelock import FileLock

    recipe = recipe or Recipe()
    folder = cache_folder() / f"quickstart-{recipe.digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _make(folder, recipe, progress)
    return folder


def _make(folder: Path, recipe: Recipe, progress: Progress | None) -> None:
    """Train into a folder beside the final one, then move: a model is there whole or not at all."""
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if progress is not None:
            make_language_model(staging, recipe, progress)
        else:
            with _shown_progress() as shown:
                make_language_model(staging, recipe, shown)
        staging.chmod(0o755)
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _shown_progress() -> Iterator[Progress]:
    """A bar on a terminal, a line every tenth elsewhere, both on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    title = "making the quickstart language model, once"
    if not console.is_terminal:
        yield lambda done, total: _line(console, title, done, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(title)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line(console: object, title: str, done: int, total: int) -> None:
    if done * 10 // total > (done - 1) * 10 // total:
        console.print(f"{title}: {100 * done // total} %", highlight=False)  # type: ignore[attr-defined]
