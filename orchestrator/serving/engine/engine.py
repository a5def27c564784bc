"""The serving engine: one thread that owns the model and runs all waiting requests as mixed batches.

A request is split into rows; rows of any requests and any prompts share a forward. Classification is one forward.
Generation goes on by iterations: receive, admit, step. In each, rows that are done leave the running batch and waiting
ones enter it; waiting classifications run in between. Where a model can't take some rows together, they run as batches
of their own, in turn. No Ray, no HTTP: any event loop may call it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import OrchestratorError, Unreachable
from orchestrator.models.backbone import Backbone
from orchestrator.serving.engine.classify import answer_probs
from orchestrator.serving.engine.generation import (
    Completion,
    Delta,
    GenerationBatch,
    GenerationRow,
    Sampling,
)
from orchestrator.serving.prompts.served_prompt import ServedPrompt

log = logging.getLogger(__name__)

Observer = Callable[[str, int], None]
FirstToken = Callable[[str, float], None]
Listener = Callable[[int, Delta], None]

MAX_BATCHES = (
    4  # that run in turn, where rows can't join; the next ones gather until one is through
)


class Overloaded(OrchestratorError):
    """Too many rows are waiting already; come back in ``retry_after`` seconds."""

    exit_code = 3

    def __init__(self, waiting: int, retry_after: int = 1) -> None:
        super().__init__(
            f"the server is busy: {waiting} inputs are waiting", f"try again in {retry_after} s"
        )
        self.args = (waiting, retry_after)
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineLimits:
    """What one forward and the waiting line may hold."""

    max_rows: int = 64
    """Rows that run at a time."""
    max_tokens: int = 16384
    """Padded tokens that run at a time, prompts and tokens still to come included; a longer row runs alone."""
    max_waiting: int = 1024
    """Rows that may wait; a request beyond it is refused."""


class Request:
    """What a caller waits for: one result a row, delivered when all are there."""

    def __init__(self, rows: int, listener: Listener | None = None) -> None:
        self.future: Future[list[Any]] = Future()
        self.listener = listener
        """Hears of every token of every row, on the engine's thread."""
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
    arrived: float = field(default_factory=time.monotonic)

    @property
    def width(self) -> int:
        """Columns that the row takes in a batch, up to its end."""
        answer = self.sampling.max_tokens if self.sampling else self.prompt.longest_answer
        return self.prompt.virtual_tokens + len(self.input_ids) + answer

    @property
    def copies(self) -> int:
        """Rows that it becomes: answers of several tokens are continued side by side."""
        return (
            len(self.prompt.answers)
            if self.sampling is None and self.prompt.longest_answer > 1
            else 1
        )

    @property
    def kinds(self) -> frozenset[str]:
        return self.prompt.prepared.kinds


class Engine:
    """Takes rows from any thread or event loop, runs them on its own thread."""

    def __init__(
        self,
        backbone: Backbone,
        limits: EngineLimits | None = None,
        observe: Observer = lambda kind, rows: None,
        first_token: FirstToken = lambda model, seconds: None,
    ) -> None:
        """``observe`` hears of each forward's kind and rows, ``first_token`` of each row's time to its first token."""
        self.backbone = backbone
        self.limits = limits or EngineLimits()
        self._observe = observe
        self._first_token = first_token
        self._ranking: deque[Job] = deque()
        self._generating: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batches: list[GenerationBatch] = []
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

    @property
    def running(self) -> int:
        """Rows that are being generated."""
        return len(self._owners)

    async def classify(
        self, prompt: ServedPrompt, inputs: Sequence[list[int]]
    ) -> list[list[float]]:
        """Probabilities [C] of the prompt's answers for each input. Overloaded when the waiting line is full."""
        return await self._ask(self._ranking, prompt, inputs, None)

    async def complete(
        self, prompt: ServedPrompt, inputs: Sequence[list[int]], sampling: Sampling
    ) -> list[Completion]:
        """One completion for each input. Overloaded when the waiting line is full."""
        return await self._ask(self._generating, prompt, inputs, sampling)

    def stream(
        self, prompt: ServedPrompt, inputs: Sequence[list[int]], sampling: Sampling
    ) -> AsyncIterator[tuple[int, Delta]]:
        """Each input's number and what came to it, as it comes; ends with the last row. Overloaded at once when the
        waiting line is full. Who stops listening frees the rows.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()

        def hear(event: tuple[int, Delta] | None) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        request = Request(len(inputs), lambda row, delta: hear((row, delta)))
        self._enqueue(self._generating, request, prompt, inputs, sampling)
        request.future.add_done_callback(lambda _: hear(None))

        async def told() -> AsyncIterator[tuple[int, Delta]]:
            try:
                while (event := await events.get()) is not None:
                    yield event
                if error := request.future.exception():
                    raise error
            finally:
                request.future.cancel()

        return told()

    def close(self) -> None:
        """Stop the thread; who still waits gets Unreachable."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._fail(
            [*self._ranking, *self._generating, *self._owners.values()],
            Unreachable("the server is stopping"),
        )

    async def _ask(
        self,
        line: deque[Job],
        prompt: ServedPrompt,
        inputs: Sequence[list[int]],
        sampling: Sampling | None,
    ) -> list[Any]:
        request = Request(len(inputs))
        self._enqueue(line, request, prompt, inputs, sampling)
        return await asyncio.wrap_future(request.future)

    def _enqueue(
        self,
        line: deque[Job],
        request: Request,
        prompt: ServedPrompt,
        inputs: Sequence[list[int]],
        sampling: Sampling | None,
    ) -> None:
        jobs = [Job(request, row, prompt, ids, sampling) for row, ids in enumerate(inputs)]
        with self._changed:
            if self._closed:
                raise Unreachable("the server is stopping")
            if self.waiting + len(jobs) > self.limits.max_waiting:
                raise Overloaded(self.waiting)
            line.extend(jobs)
            self._changed.notify()

    def _loop(self) -> None:
        while self._wait_for_work():
            if jobs := self._take(self._ranking):
                self._guarded(jobs, self._rank)
            if len(self._batches) < MAX_BATCHES and (
                jobs := self._take(self._generating, list(self._owners.values()))
            ):
                self._guarded(jobs, self._admit)
            for batch in list(self._batches):
                jobs = [self._owners[row] for row in batch.rows]
                self._guarded(jobs, lambda _, batch=batch: self._step(batch), batch)  # type: ignore[misc]

    def _wait_for_work(self) -> bool:
        with self._changed:
            while not (self._closed or self._ranking or self._generating or self._batches):
                self._changed.wait()
            return not self._closed

    def _take(self, line: deque[Job], running: Sequence[Job] = ()) -> list[Job]:
        """The next rows, first come first served, within the limits beside those that run; rows that nobody waits for
        are dropped.

        Rows that can't share a forward with the first one keep their place in the line.
        """
        taken: list[Job] = []
        left: list[Job] = []
        width = max((job.width for job in running), default=0)
        rows = len(running)
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
                over = rows > self.limits.max_rows or rows * width > self.limits.max_tokens
                if over and (taken or running):
                    left.append(job)
                    break
                taken.append(job)
            line.extendleft(reversed(left))
        return taken

    def _guarded(
        self,
        jobs: list[Job],
        work: Callable[[list[Job]], None],
        batch: GenerationBatch | None = None,
    ) -> None:
        """A batch that fails answers its own requests with the error; the thread goes on."""
        try:
            work(jobs)
        except Exception as error:
            log.exception("a batch of %d rows failed", len(jobs))
            failed = {id(job) for job in jobs}
            self._batches = [it for it in self._batches if it is not batch]
            self._owners = {row: job for row, job in self._owners.items() if id(job) not in failed}
            self._fail(jobs, error)

    def _rank(self, jobs: list[Job]) -> None:
        self._observe("classify", len(jobs))
        probs = answer_probs(
            self.backbone, [job.prompt for job in jobs], [job.input_ids for job in jobs]
        )
        for job, row in zip(jobs, probs, strict=True):
            job.request.deliver(job.row, row)

    def _admit(self, jobs: list[Job]) -> None:
        """Run the rows' inputs, and let them join a running batch where the model can."""
        rows = [
            GenerationRow(job.prompt, job.input_ids, job.sampling or Sampling()) for job in jobs
        ]
        self._observe("prefill", len(rows))
        entering = GenerationBatch(self.backbone, rows)
        if not any(batch.absorb(entering) for batch in self._batches):
            self._batches.append(entering)
        self._owners.update(zip(rows, jobs, strict=True))

    def _step(self, batch: GenerationBatch) -> None:
        for row in batch.rows:
            row.abandoned = self._owners[row].request.over
        rows = [row for row in batch.rows if not row.abandoned]
        self._observe("generate", len(rows))
        done = batch.step()
        for row in rows:
            self._tell(row, self._owners[row])
        for row in done:
            self._deliver(row, self._owners.pop(row))
        if not batch.rows:
            self._batches.remove(batch)

    def _tell(self, row: GenerationRow, job: Job) -> None:
        if len(row.made) == 1:
            self._first_token(job.prompt.name, time.monotonic() - job.arrived)
        if (
            job.request.listener
            and not job.request.over
            and row.failure is None
            and (news := row.pull())
        ):
            job.request.listener(job.row, news)

    def _deliver(self, row: GenerationRow, job: Job) -> None:
        if row.completion is not None:
            job.request.deliver(job.row, row.completion)
        elif row.failure is not None:
            log.error("a row failed", exc_info=row.failure)
            job.request.fail(row.failure)

    def _fail(self, jobs: Sequence[Job], error: BaseException) -> None:
        for job in jobs:
            job.request.fail(error)
