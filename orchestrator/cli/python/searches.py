"""Planning, running and resuming a search, and looking at it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.cli.python.jobs import JobLike, checked_job
from orchestrator.errors import Interrupted
from orchestrator.job.spec import JobSpec
from orchestrator.search.inputs import Inputs
from orchestrator.search.progress import Progress, ProgressFactory
from orchestrator.search.state.folder import SearchFolder, searches_folder
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.garbage import uncollected
from orchestrator.utils.interrupts import Interrupts

if TYPE_CHECKING:
    import pandas

    from orchestrator.cli.python.jobs import Data
    from orchestrator.search.plan.plan import Plan
    from orchestrator.search.report import SearchFacts
    from orchestrator.search.state.trials import TrialRecord

SETTINGS_OF_RAY = ("RAY_", "TUNE_")  # how the names of its variables begin
FIRST_ROWS = 10  # of the trials, in a notebook


def plan(
    job: JobLike,
    data: Data | None = None,
    *,
    progress: bool = True,
    address: str | None = None,
    verbose: bool = False,
) -> SearchPlan:
    """Measure a few real steps of a job, and estimate what its search will take.

    ``job`` is a Job, a mapping, or the path of a job file; ``data`` replaces its ``data.path``.
    ``address`` is that of a Ray cluster, by default RAY_ADDRESS or else this machine. ``progress``
    shows what is being done. Nothing is kept. Raises BadInput for a job that ``run`` would refuse.
    """
    spec, inputs = checked_job(job, data)
    show = progress_display(spec, progress)
    with _as_guest():
        with uncollected():
            from orchestrator.search.plan.job import plan_job

        found = plan_job(spec, show.stage, address, verbose, inputs)
    return SearchPlan(spec, found)


def run(
    job: JobLike,
    data: Data | None = None,
    *,
    progress: bool | Progress = True,
    address: str | None = None,
    planned: bool = False,
    verbose: bool = False,
) -> SearchResult:
    """Run a job's search, and register its best prompt.

    ``job`` is a Job, a mapping, or the path of a job file; ``data`` replaces its ``data.path``.
    ``progress`` is True for the display of the command line (in a notebook, a live table below the
    cell), False for none, or an object like it. ``address`` is that of a Ray cluster, by default
    RAY_ADDRESS or else this machine. ``planned`` measures the job first, and keeps the estimate
    beside the outcome. ``verbose`` also shows the logs of Ray and its workers.

    An interrupt (Ctrl-C, or a notebook's button) stops the search and raises Interrupted, from
    which ``resume`` goes on. Raises BadInput before anything is spent, and the other errors of the
    command line.
    """
    spec, inputs = checked_job(job, data)
    show = progress_display(spec, progress)
    with _as_guest():
        return run_checked(spec, inputs, show, address, verbose, planned)


def resume(
    search: str | os.PathLike[str] = "latest",
    *,
    progress: bool | Progress = True,
    address: str | None = None,
    verbose: bool = False,
) -> SearchResult:
    """Go on with a search that was interrupted or killed.

    ``search`` is its id, the beginning of its id, its folder, or latest. A search that is finished
    is not run again. Raises BadInput for a search that does not exist, that is still running, or
    whose data or base model has changed.
    """
    with _as_guest():
        factory: ProgressFactory = lambda spec: progress_display(spec, progress)  # noqa: E731
        return resume_saved(os.fspath(search), factory, address, verbose)


def load_search(search: str | os.PathLike[str] = "latest") -> SearchResult:
    """Load a search that was run here, finished or not, to look at it.

    ``search`` is its id, the beginning of its id, its folder, or latest. Raises BadInput for a
    search that does not exist.
    """
    from orchestrator.search.state.saved import find_search

    return SearchResult(find_search(os.fspath(search)))


def run_checked(
    job: JobSpec,
    inputs: Inputs,
    progress: Progress,
    address: str | None = None,
    verbose: bool = False,
    planned: bool = False,
) -> SearchResult:
    """Run a job whose files have been checked, for ``run`` here and on the command line."""
    with uncollected():
        from orchestrator.search.run import run_job
    document = run_job(job, progress, address, verbose, planned, inputs=inputs)
    return SearchResult(SearchFolder(searches_folder() / document["search"]), job, document)


def resume_saved(
    search: str, progress_for: ProgressFactory, address: str | None = None, verbose: bool = False
) -> SearchResult:
    """Resume a search, for ``resume`` here and on the command line."""
    with uncollected():
        from orchestrator.search.resume import resume_search
        from orchestrator.search.state.saved import find_search
    document, job = resume_search(search, progress_for, address, verbose)
    return SearchResult(find_search(search), job, document)


def progress_display(job: JobSpec, progress: bool | Progress) -> Progress:
    """Return the display that ``progress`` asks for, suited to a notebook or a terminal."""
    if not isinstance(progress, bool):
        return progress
    from orchestrator.cli.python.notebook import NotebookProgress, in_notebook

    if progress and in_notebook():
        return NotebookProgress(job)
    from orchestrator.cli.common import console_progress

    return console_progress(quiet=not progress)(job)


@contextmanager
def _as_guest() -> Iterator[None]:
    """Run a search in a process that is not ours, and leave the process as it was.

    The first SIGINT or SIGTERM stops the search, as on the command line; handlers are set in the
    main thread alone. An error for an interrupt says how to go on in Python. Settings for Ray are
    taken out of the environment again, where they would change other work with Ray.
    """
    before = set(os.environ)
    try:
        with Interrupts():
            yield
    except Interrupted as error:
        search = error.hint.rpartition(" ")[2]
        hint = f"orchestrator.resume({search!r}) in Python, or {error.hint}"
        raise Interrupted(error.message, hint) from None
    finally:
        for name in set(os.environ) - before:
            if name.startswith(SETTINGS_OF_RAY):
                del os.environ[name]


@dataclass(frozen=True)
class SearchPlan:
    """The estimate of a search. In a notebook or printed, it is what the verb ``plan`` shows."""

    job: JobSpec
    plan: Plan

    @property
    def document(self) -> JsonObject:
        """The estimate as ``plan --json`` prints it."""
        return self.plan.document()

    @property
    def trials(self) -> int:
        """The number of trials."""
        return self.plan.trials

    @property
    def seconds(self) -> dict[str, float]:
        """The estimated seconds of each part, and their total."""
        return self.plan.seconds

    @property
    def device_hours(self) -> float:
        """The hours of all accelerators together, or of all workers if there are none."""
        return self.plan.device_hours

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what will not fit, and on what makes the estimate or result less sure."""
        return self.plan.data_warnings + self.plan.warnings

    def __str__(self) -> str:
        from orchestrator.cli.pages.search import plan_page

        return "\n".join(plan_page(self.plan, self.job))

    def __repr__(self) -> str:
        return (
            f"<SearchPlan of {self.job.name}: {self.trials} trials, {self.seconds['total']:.0f} s>"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


@dataclass(frozen=True)
class BestTrial:
    """The best trial of a search: its configuration, and its metrics by split."""

    trial: str
    config: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Report:
    """The page about a search: an HTML file, which a notebook shows in a frame."""

    file: Path

    def __fspath__(self) -> str:
        return str(self.file)

    def __str__(self) -> str:
        return str(self.file)

    def _repr_html_(self) -> str:
        """Show the page in a frame of its own, so that its style does not reach the notebook."""
        page = escape(self.file.read_text(encoding="utf-8"))
        style = "width:100%;height:40rem;border:1px solid #ddd"
        return f'<iframe sandbox srcdoc="{page}" style="{style}"></iframe>'


class SearchResult:
    """A search as its folder keeps it, finished or not: trials, curves, best trial, report."""

    def __init__(
        self, folder: SearchFolder, job: JobSpec | None = None, document: JsonObject | None = None
    ) -> None:
        self._folder = folder
        self._job = job
        self._document = document

    @property
    def id(self) -> str:
        """The search's id, which ``resume`` and ``load_search`` take."""
        return self._folder.id

    @property
    def folder(self) -> Path:
        """The folder that keeps the search."""
        return self._folder.path

    @property
    def job(self) -> JobSpec:
        """The job."""
        return self._job or self._facts.job

    @property
    def document(self) -> JsonObject:
        """The result as ``run --json`` prints it. It is empty for a search that is not finished."""
        return self._document or dict(self._facts.result or {})

    @property
    def finished(self) -> bool:
        """Tell whether the search has run to its end."""
        return bool(self.document)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences on what makes the result less trustworthy."""
        return tuple(self.document.get("warnings", self._facts.warnings))

    @property
    def model(self) -> str | None:
        """The registered version, as ``load`` takes it; None if nothing was registered."""
        model = self.document.get("model")
        return f"{model['name']}:{model['version']}" if model else None

    @property
    def best(self) -> BestTrial | None:
        """The best trial, or the best so far; None if no trial has been evaluated."""
        if self.document:
            found = self.document["best"]
            return BestTrial(found["trial"], found["config"], found["metrics"])
        winner = self._facts.winner
        if winner is None:
            return None
        return BestTrial(winner.id, winner.spec.config(), {"validation": winner.metrics})

    @cached_property
    def trials(self) -> pandas.DataFrame:
        """A data frame with a row for each trial, by its id, best first.

        The columns are its status, its configuration, the steps that it took, the validation
        metrics of its best evaluation, the seconds that it was trained, and a note on a failure.
        """
        import pandas

        ranked = self._facts.scored
        known = {trial.id for trial in ranked}
        others = [trial for trial in self._facts.trials if trial.id not in known]
        rows = _without_idle([_row(trial) for trial in (*ranked, *others)])
        return pandas.DataFrame(rows, columns=None if rows else ["trial"]).set_index("trial")

    @cached_property
    def curves(self) -> pandas.DataFrame:
        """A data frame with a row for each evaluation of each trial: its step and its metrics.

        ``curves.pivot(index="step", columns="trial", values="accuracy")`` has a curve a column.
        """
        import pandas

        rows = [
            {"trial": trial.id, "step": step, **metrics}
            for trial in self._facts.trials
            for step, metrics in trial.points
        ]
        return pandas.DataFrame(rows, columns=None if rows else ["trial", "step"])

    @property
    def baselines(self) -> pandas.DataFrame:
        """A data frame of the search's metric, with the baselines and the best trial as rows."""
        import pandas

        from orchestrator.utils.wording import BASELINE_NAMES

        metric = self.job.search.metric
        rows: dict[str, Any] = {
            BASELINE_NAMES.get(name, name): found for name, found in self._facts.baselines.items()
        }
        if self.best is not None:
            rows[self.job.result_name()] = self.best.metrics
        values = {
            name: {split: found.get(split, {}).get(metric) for split in ("validation", "test")}
            for name, found in rows.items()
        }
        return pandas.DataFrame.from_dict(values, orient="index", dtype=float)

    def report(self, file: str | os.PathLike[str] | None = None, *, log: bool = False) -> Report:
        """Write the HTML page about the search; a notebook shows it.

        ``file`` is by default report.html in the search's folder. ``log`` also logs the page to the
        search's MLflow run.
        """
        from orchestrator.registry import Registry
        from orchestrator.search.report import write_report

        page = Path(file) if file else self._folder.report
        write_report(self._read(), page, Registry.connect() if log else None)
        return Report(page)

    @cached_property
    def _facts(self) -> SearchFacts:
        return self._read()

    def _read(self) -> SearchFacts:
        from orchestrator.search.report import read_facts

        return read_facts(self._folder)

    def __str__(self) -> str:
        from orchestrator.cli.pages.search import run_summary

        if self.document:
            return "\n".join(run_summary(self.document, self.job))
        over = sum(trial.status.is_over for trial in self._facts.trials)
        counts = f"{over} of {len(self._facts.trials)} known trials are over"
        return (
            f"search {self.id} is not finished: {counts}\n"
            f"next: orchestrator.resume({self.id!r}) in Python, or orchestrator resume {self.id}"
        )

    def __repr__(self) -> str:
        state = "finished" if self.finished else "not finished"
        best = "" if self.best is None else f", best trial {self.best.trial}"
        return f"<SearchResult {self.id}: {state}{best}>"

    def _repr_html_(self) -> str:
        """Show the summary, the curves and the best trials, in a notebook."""
        more = len(self.trials) - FIRST_ROWS
        return "".join(
            [
                f"<pre>{escape(str(self))}</pre>",
                self._curves_image(),
                self.trials.head(FIRST_ROWS).to_html(float_format="{:.4g}".format, na_rep=""),
                f"<p>and {more} more: <code>.trials</code></p>" if more > 0 else "",
            ]
        )

    def _curves_image(self) -> str:
        import base64

        from orchestrator.search.report.figures import draw

        svg = draw(self._facts, ["curves"]).get("curves")
        if svg is None:
            return ""
        data = base64.b64encode(svg).decode()
        return f'<img alt="metric over steps" src="data:image/svg+xml;base64,{data}">'


def _row(trial: TrialRecord) -> dict[str, Any]:
    """Return what the data frame of trials shows of a trial."""
    spec = {field.name: getattr(trial.spec, field.name) for field in fields(trial.spec)}
    return {
        "trial": trial.id, "status": str(trial.status), **spec, "steps": trial.step,
        "best_step": trial.best_step, **trial.metrics, "seconds": trial.costs.seconds,
        "note": trial.note,
    }  # fmt: skip


def _without_idle(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the columns that say nothing of any trial, such as those of other methods."""
    kept = [
        name
        for name in dict.fromkeys(name for row in rows for name in row)
        if name == "seed" or any(row.get(name) not in (None, "", 0) for row in rows)
    ]
    return [{name: row.get(name) for name in kept} for row in rows]


for public in (SearchPlan, SearchResult, BestTrial, Report):
    public.__module__ = "orchestrator"
