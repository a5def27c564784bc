"""The serving engine: one thread that owns the model and runs all waiting requests as mixed batches.

A request is split into rows; rows of any requests and any prompts share a forward. Classification is one forward;
generation is many, so waiting classifications run between its steps. Where a model can't take prompts of some kinds
together, rows of the other kind wait for the next batch. No Ray, no HTTP: any event loop may call it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from orchestrator.backbone import Backbone
from orchestrator.errors import OrchestratorError, Unreachable
from orchestrator.serving.generation import Completion, GenerationBatch, GenerationRow, Sampling
from orchestrator.serving.ranking import answer_probs
from orchestrator.serving.served_prompt import ServedPrompt

log = logging.getLogger(__name__)

Observer = Callable[[str, int], None]


class Overloaded(OrchestratorError):
    """Too many rows are waiting already; come back in ``retry_after`` seconds."""

    exit_code = 3

    def __init__(self, waiting: int, retry_after: int = 1) -> None:
        super().__init__(f"the server is busy: {waiting} inputs are waiting", f"try again in {retry_after} s")
        self.args = (waiting, retry_after)
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineLimits:
    """What one forward and the waiting line may hold."""

    max_rows: int = 64
    """Rows in one batch."""
    max_tokens: int = 16384
    """Padded tokens of one batch, prompts and tokens still to come included; a longer row runs alone."""
    max_waiting: int = 1024
    """Rows that may wait; a request beyond it is refused."""


class Request:
    """What a caller waits for: one result a row, delivered when all are there."""

    def __init__(self, rows: int) -> None:
        self.future: Future[list[Any]] = Future()
        self._results: list[Any] = [None] * rows
        self._left = rows

    def deliver(self, row: int, result: Any) -> None:
        self._results[row] = result
        self._left -= 1
        if self._left == 0:
            with suppress(InvalidStateError):  # the caller went away in this very moment
                self.future.set_result(self._results)

    def fail(self, error: BaseException) -> None:
        with suppress(InvalidStateError):
            if not self.future.done():
                self.future.set_exception(error)

    @property
    def over(self) -> bool:
        """Nobody waits any more: the caller left, or another row failed."""
        return self.future.done()


@dataclass(frozen=True, eq=False)
class Job:
    """One row in the waiting line."""

    request: Request
    row: int
    prompt: ServedPrompt
    input_ids: list[int]
    sampling: Sampling | None

    @property
    def width(self) -> int:
        """Columns that the row takes in a batch, up to its end."""
        answer = self.sampling.max_tokens if self.sampling else self.prompt.longest_answer
        return self.prompt.virtual_tokens + len(self.input_ids) + answer

    @property
    def copies(self) -> int:
        """Rows that it becomes: answers of several tokens are continued side by side."""
        return len(self.prompt.answers) if self.sampling is None and self.prompt.longest_answer > 1 else 1

    @property
    def kinds(self) -> frozenset[str]:
        return self.prompt.prepared.kinds


class Engine:
    """Takes rows from any thread or event loop, runs them on its own thread."""

    def __init__(
        self, backbone: Backbone, limits: EngineLimits | None = None, observe: Observer = lambda kind, rows: None
    ) -> None:
        self.backbone = backbone
        self.limits = limits or EngineLimits()
        self._observe = observe
        self._ranking: deque[Job] = deque()
        self._generating: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batch: GenerationBatch | None = None
        self._owners: dict[GenerationRow, Job] = {}
        self._thread = threading.Thread(target=self._loop, name="serving-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """Rows that no batch has taken yet."""
        return len(self._ranking) + len(self._generating)

    async def classify(self, prompt: ServedPrompt, inputs: Sequence[list[int]]) -> list[list[float]]:
        """Probabilities [C] of the prompt's answers for each input. Overloaded when the waiting line is full."""
        return await self._ask(self._ranking, prompt, inputs, None)

    async def complete(self, prompt: ServedPrompt, inputs: Sequence[list[int]], sampling: Sampling) -> list[Completion]:
        """One completion for each input. Overloaded when the waiting line is full."""
        return await self._ask(self._generating, prompt, inputs, sampling)

    def close(self) -> None:
        """Stop the thread; who still waits gets Unreachable."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._fail([*self._ranking, *self._generating, *self._owners.values()], Unreachable("the server is stopping"))

    async def _ask(
        self, line: deque[Job], prompt: ServedPrompt, inputs: Sequence[list[int]], sampling: Sampling | None
    ) -> list[Any]:
        request = Request(len(inputs))
        jobs = [Job(request, row, prompt, ids, sampling) for row, ids in enumerate(inputs)]
        with self._changed:
            if self._closed:
                raise Unreachable("the server is stopping")
            if self.waiting + len(jobs) > self.limits.max_waiting:
                raise Overloaded(self.waiting)
            line.extend(jobs)
            self._changed.notify()
        return await asyncio.wrap_future(request.future)

    def _loop(self) -> None:
        while self._wait_for_work():
            if jobs := self._take(self._ranking):
                self._guarded(jobs, self._rank)
            if self._batch is None and (jobs := self._take(self._generating)):
                self._guarded(jobs, self._start_generation)
            if self._batch is not None:
                self._guarded(list(self._owners.values()), self._step_generation)

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._ranking or self._generating or self._batch):
                self._changed.wait()
            return not self._closed

    def _take(self, line: deque[Job]) -> list[Job]:
        """The next batch, first come first served, within the limits; rows that nobody waits for are dropped.

        Rows that can't share a forward with the first one keep their place in the line.
        """
        taken: list[Job] = []
        left: list[Job] = []
        width = rows = 0
        kinds: frozenset[str] = frozenset()
        with self._changed:
            while line:
                job = line.popleft()
                if job.request.over:
                    continue
                if not self.backbone.shares_forward(kinds | job.kinds):
                    left.append(job)
                    continue
                width, rows, kinds = max(width, job.width), rows + job.copies, kinds | job.kinds
                if taken and (rows > self.limits.max_rows or rows * width > self.limits.max_tokens):
                    left.append(job)
                    break
                taken.append(job)
            line.extendleft(reversed(left))
        return taken

    def _guarded(self, jobs: list[Job], work: Callable[[list[Job]], None]) -> None:
        """A batch that fails answers its own requests with the error; the thread goes on."""
        try:
            work(jobs)
        except Exception as error:
            log.exception("a batch of %d rows failed", len(jobs))
            self._batch = None
            self._owners = {}
            self._fail(jobs, error)

    def _rank(self, jobs: list[Job]) -> None:
        self._observe("classify", len(jobs))
        probs = answer_probs(self.backbone, [job.prompt for job in jobs], [job.input_ids for job in jobs])
        for job, row in zip(jobs, probs, strict=True):
            job.request.deliver(job.row, row)

    def _start_generation(self, jobs: list[Job]) -> None:
        rows = [GenerationRow(job.prompt, job.input_ids, job.sampling or Sampling()) for job in jobs]
        self._batch = GenerationBatch(self.backbone, rows)
        self._owners = dict(zip(rows, jobs, strict=True))

    def _step_generation(self, _: list[Job]) -> None:
        assert self._batch is not None
        for row, job in self._owners.items():
            row.abandoned = job.request.over
        self._observe("generate", len(self._batch.rows))
        for row in self._batch.step():
            job = self._owners.pop(row)
            if row.completion is not None:
                job.request.deliver(job.row, row.completion)
        if not self._batch.rows:
            self._batch = None

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            job.request.fail(error)
