"""The log of one search in MLflow: a parent run and one child run per trial.

Training never waits for MLflow. Calls only queue entries. One background thread, the writer, merges
queued entries and writes them in batches; while MLflow does not answer, it retries with growing
pauses. Entries that are still unwritten at the end go to a file and are reported.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from orchestrator.errors import JobFailed, OrchestratorError, Unreachable
from orchestrator.registry.runs.entries import (
    MAX_PARAM,
    MAX_TAG,
    LogEntry,
    as_texts,
    chunks,
    coalesce,
    load_entries,
    run_label,
    save_entries,
)
from orchestrator.registry.store import Store
from orchestrator.utils.wording import counted

if TYPE_CHECKING:
    from mlflow.entities import Run

PARENT_TAG = "mlflow.parentRunId"
TRIAL_TAG = "orchestrator.trial"
STATE_TAG = "orchestrator.state"
ERROR_TAG = "orchestrator.error"
NOT_FINITE_TAG = "orchestrator.not_finite"

METRICS_A_CALL = 1000
PARAMS_A_CALL = 100
LINGER_SECONDS = 0.2  # batches the reports of trials that share a worker
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 15.0
LAST_PAUSE = 1.0  # longest pause between attempts once a caller waits in close()

State = Literal["finished", "stopped", "failed", "interrupted"]
Status = Literal["FINISHED", "FAILED", "KILLED"]

# A trial that the scheduler stopped is a normal outcome. Its state tag distinguishes it from a
# trial that ran to its end.
STATUS: dict[State, Status] = {
    "finished": "FINISHED",
    "stopped": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
SEARCH_STATE: dict[Status, str] = {
    "FINISHED": "finished",
    "FAILED": "failed",
    "KILLED": "interrupted",
}


class SearchLog:
    """The log of one search.

    Every method except ``flush``, ``finish`` and ``close`` returns at once and raises nothing.
    """

    def __init__(
        self,
        store: Store,
        parent: Run,
        run_ids: Mapping[str, str],
        spill: Path,
        patience: float,
        ended: Collection[str] = (),
    ) -> None:
        """Start the writer thread.

        ``ended`` names the trials whose runs had already ended, in a search that is resumed.
        """
        self.run_id: str = parent.info.run_id
        self.ended = frozenset(ended)
        self.experiment_id: str = parent.info.experiment_id
        self.spill = spill
        self.patience = patience
        self._store = store
        self._run_ids = dict(run_ids)
        self._known = set(run_ids)
        self._attempted: set[str] = set()
        self._changed = threading.Condition()
        # Entries that an earlier attempt could not write go first, except that attempt's finish.
        self._pending = [entry for entry in load_entries(spill) if entry.kind != "finish"]
        self._unwritten: deque[LogEntry] = deque()
        self._refused: list[tuple[LogEntry, OrchestratorError]] = []
        self._last_error: OrchestratorError | None = None
        self._hurry = threading.Event()
        self._gave_up = threading.Event()
        self._closed = False
        self._writer = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._writer.start()

    @property
    def run_ids(self) -> dict[str, str]:
        """Each trial's MLflow run, as far as written; save it to resume after an interruption."""
        return dict(self._run_ids)

    def trial_started(
        self,
        trial_id: str,
        config: Mapping[str, Any],
        at: int | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Open the trial's child run; a trial that was started before continues in the same run.

        ``at``, here and below, is the event's time in milliseconds; the default is now. Logging a
        point twice with the same time has no further effect.
        """
        self._known.add(trial_id)
        params = as_texts(config, MAX_PARAM)
        named = as_texts(tags or {}, MAX_TAG) | {STATE_TAG: "running"}
        self._put(
            _dated(
                LogEntry(
                    "start", trial_id, params=params, tags=named, name=run_label(config, trial_id)
                ),
                at,
            )
        )

    def trial_metrics(
        self, trial_id: str, step: int, metrics: Mapping[str, float], at: int | None = None
    ) -> None:
        """Log a report of a trial.

        Non-finite values become a tag, because charts and databases can't handle them.
        """
        if trial_id not in self._known:
            self.trial_started(trial_id, {})
        self._put(_metrics_entry(trial_id, step, metrics, at))

    def trial_tags(self, trial_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags on the run of a trial that has started."""
        self._put(LogEntry("log", trial_id, tags=as_texts(tags, MAX_TAG)))

    def trial_ended(
        self, trial_id: str, state: State, error: str = "", at: int | None = None
    ) -> None:
        """Close the trial's run; ``error`` is the reason of a failure."""
        tags = {STATE_TAG: state} | ({ERROR_TAG: error} if error else {})
        self._put(
            _dated(
                LogEntry("end", trial_id, tags=as_texts(tags, MAX_TAG), status=STATUS[state]), at
            )
        )

    def parent_metrics(
        self, metrics: Mapping[str, float], step: int = 0, at: int | None = None
    ) -> None:
        """Log metrics of the search itself, such as its baselines."""
        self._put(_metrics_entry(None, step, metrics, at))

    def parent_tags(self, tags: Mapping[str, Any]) -> None:
        self._put(LogEntry("log", tags=as_texts(tags, MAX_TAG)))

    def parent_params(self, params: Mapping[str, Any]) -> None:
        self._put(LogEntry("log", params=as_texts(params, MAX_PARAM)))

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written; return False if it is not after that many seconds."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._pending and not self._unwritten, seconds
            )

    def finish(self, status: Status = "FINISHED") -> None:
        """End the search's run, mark its running trials as KILLED, and close the log."""
        if not self._closed:
            self._put(LogEntry("finish", status=status, tags={STATE_TAG: SEARCH_STATE[status]}))
        self.close()

    def close(self) -> None:
        """Write the queued entries, for at most ``patience`` seconds.

        Raises Unreachable when MLflow did not answer: the entries are then in the file ``spill``,
        and ``Registry.resume_search`` with the same file writes them. Raises JobFailed when MLflow
        refused an entry, for instance a parameter whose value changed.
        """
        if self._closed:
            return
        self._closed = True
        self._hurry.set()
        self.flush(self.patience)
        self._gave_up.set()
        with self._changed:
            self._changed.notify_all()
        self._writer.join(timeout=LAST_PAUSE)
        self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.finish()
            return
        try:
            self.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        except (OrchestratorError, OSError) as loss:
            error.add_note(str(loss))  # the error that ended the search matters more

    def _settle(self) -> None:
        """Save and report unwritten entries; without any, delete an earlier attempt's file."""
        with self._changed:
            left = [*self._unwritten, *self._pending]
        refused_file = self.spill.with_suffix(".refused.jsonl")
        if self._refused:
            save_entries(refused_file, [entry for entry, _ in self._refused])
        if left:
            save_entries(self.spill, left)
            reason = (
                self._last_error.message if self._last_error else "MLflow did not answer in time"
            )
            raise Unreachable(
                f"{_entries(len(left))} of the search log could not be written to MLflow: {reason}",
                f"they are kept in {self.spill}; bring MLflow back and resume the search to write "
                "them",
            )
        self.spill.unlink(missing_ok=True)
        if self._refused:
            raise JobFailed(
                f"MLflow refused {_entries(len(self._refused))} of the search log, first: "
                f"{self._refused[0][1].message}",
                f"they are kept in {refused_file}",
            )

    def _put(self, entry: LogEntry) -> None:
        with self._changed:
            self._pending.append(entry)
            self._changed.notify_all()

    # The methods below run in the writer thread.

    def _work(self) -> None:
        while self._take():
            while self._unwritten:
                if not self._write(self._unwritten[0]):
                    return
                with self._changed:
                    self._unwritten.popleft()
                    self._changed.notify_all()

    def _take(self) -> bool:
        """Wait for entries and move them to the unwritten ones; return False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._gave_up.is_set())
        self._hurry.wait(LINGER_SECONDS)
        with self._changed:
            if self._gave_up.is_set():
                return False
            self._unwritten.extend(coalesce(self._pending))
            self._pending.clear()
            return True

    def _write(self, entry: LogEntry) -> bool:
        """Write one entry, however long MLflow is unreachable; return False after giving up."""
        pause = FIRST_PAUSE
        while not self._gave_up.is_set():
            try:
                self._apply(entry)
                return True
            except Exception as error:
                problem = self._store.translate(error, "logging the search")
                if not isinstance(problem, Unreachable):
                    self._refused.append((entry, problem))
                    return True
                self._last_error = problem
            if self._hurry.is_set():
                self._gave_up.wait(min(pause, LAST_PAUSE))
            else:
                self._hurry.wait(pause)
            pause = min(pause * 2, LONGEST_PAUSE)
        return False

    def _apply(self, entry: LogEntry) -> None:
        run_id = self.run_id if entry.trial is None else self._child(entry)
        self._log(run_id, entry)
        if entry.kind == "finish":
            self._end_children()
        if entry.kind in ("end", "finish"):
            self._store.client.set_terminated(run_id, entry.status, entry.at)

    def _log(self, run_id: str, entry: LogEntry) -> None:
        # Repeating a call is harmless: a point has its own time, and writing a parameter or a tag
        # again with the same value changes nothing.
        from mlflow.entities import Metric, Param, RunTag

        client = self._store.client
        for points in chunks(entry.metrics, METRICS_A_CALL):
            client.log_batch(
                run_id, metrics=[Metric(key, value, at, step) for key, value, step, at in points]
            )
        for tags in chunks(list(entry.tags.items()), PARAMS_A_CALL):
            client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags])
        for params in chunks(list(entry.params.items()), PARAMS_A_CALL):
            client.log_batch(run_id, params=[Param(key, value) for key, value in params])

    def _child(self, entry: LogEntry) -> str:
        """Return the trial's run; open it when the entry starts the trial."""
        trial = str(entry.trial)
        known = self._run_ids.get(trial)
        if known is not None and entry.kind != "start":
            return known
        if known is None and trial in self._attempted:
            # The first attempt may have created the run although its answer was lost.
            known = children(self._store, self.experiment_id, self.run_id).get(trial)
        self._attempted.add(trial)
        if known is None:
            known = self._create(trial, entry)
        else:
            self._store.client.update_run(known, status="RUNNING")
        self._run_ids[trial] = known
        return known

    def _create(self, trial: str, entry: LogEntry) -> str:
        tags = {PARENT_TAG: self.run_id, TRIAL_TAG: trial}
        run = self._store.client.create_run(self.experiment_id, entry.at, tags, entry.name or trial)
        return str(run.info.run_id)

    def _end_children(self) -> None:
        # A loop, because a lost answer may have left two runs of one trial, and ``children``
        # returns only one run per trial.
        while running := children(self._store, self.experiment_id, self.run_id, "RUNNING"):
            for run_id in running.values():
                self._store.client.set_tag(run_id, STATE_TAG, "interrupted")
                self._store.client.set_terminated(run_id, "KILLED")


def children(store: Store, experiment_id: str, parent: str, status: str = "") -> dict[str, str]:
    """Map the trials of a search to their child runs, as MLflow has them."""
    condition = f"tags.`{PARENT_TAG}` = '{parent}'" + (
        f" and attributes.status = '{status}'" if status else ""
    )
    found: dict[str, str] = {}
    token: str | None = None
    while True:
        page = store.client.search_runs([experiment_id], condition, page_token=token)
        found |= {
            run.data.tags[TRIAL_TAG]: run.info.run_id for run in page if TRIAL_TAG in run.data.tags
        }
        token = page.token
        if not token:
            return found


def _entries(count: int) -> str:
    return counted(count, "entry", "entries")


def _dated(entry: LogEntry, at: int | None) -> LogEntry:
    return entry if at is None else replace(entry, at=at)


def _metrics_entry(
    trial: str | None, step: int, metrics: Mapping[str, float], at: int | None
) -> LogEntry:
    entry = _dated(LogEntry("log", trial), at)
    for key, value in metrics.items():
        if math.isfinite(value):
            entry.metrics.append((key, float(value), int(step), entry.at))
        else:
            entry.tags[NOT_FINITE_TAG] = f"{key} was {value} at step {step}"
    return entry
