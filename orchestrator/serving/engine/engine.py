"""The serving engine: one thread that owns the model and runs all waiting rows in mixed batches.

A request is split into rows. Rows of different requests and different prompts share a forward.
Classifying a batch takes one forward. Generation is iterative (continuous batching): in each
iteration, finished rows leave the running batch and waiting rows join it. Waiting classifications
run between iterations. Rows that the model can't take together run in separate batches, in turn.
The engine uses neither Ray nor HTTP, and any event loop may call it.
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
from typing import Any, Generic, TypeVar

from orchestrator.errors import OrchestratorError, Unreachable
from orchestrator.models.backbone import Backbone
from orchestrator.serving.engine.classify import answer_probs
from orchestrator.serving.engine.constraints import ConstraintFailed
from orchestrator.serving.engine.generation import (
    Completion,
    Delta,
    GenerationBatch,
    GenerationRow,
    Sampling,
)
from orchestrator.serving.engine.input_scores import score_inputs
from orchestrator.serving.prompts.served_prompt import ServedPrompt

Result = TypeVar("Result")

log = logging.getLogger(__name__)

Observer = Callable[[str, int], None]
FirstToken = Callable[[str, float], None]
Listener = Callable[[int, Delta], None]

# Batches that run in turn when their rows can't join; further rows wait until one is finished.
MAX_BATCHES = 4


class Overloaded(OrchestratorError):
    """Too many rows are waiting; the client may try again in ``retry_after`` seconds."""

    exit_code = 3

    def __init__(self, waiting: int, retry_after: int = 1) -> None:
        super().__init__(
            f"the server is busy: {waiting} inputs are waiting", f"try again in {retry_after} s"
        )
        self.args = (waiting, retry_after)
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineLimits:
    """The largest number of rows and tokens in a forward, and of rows in the queue."""

    max_rows: int = 64
    """Rows that run at the same time."""
    max_tokens: int = 16384
    """Padded tokens that run at the same time, including prompts and tokens not yet generated.

    A row that is longer by itself runs alone.
    """
    max_waiting: int = 1024
    """Rows that may wait; a request that would exceed the limit is refused."""


class PendingRequest(Generic[Result]):
    """A pending request: one result per row, delivered together when all are there."""

    def __init__(self, rows: int, listener: Listener | None = None) -> None:
        self.future: Future[list[Result]] = Future()
        self.listener = listener
        """Called on the engine's thread with what each row gains, token by token."""
        self._results: list[Any] = [None] * rows
        self._left = rows

    def deliver(self, row: int, result: Result) -> None:
        """Store a row's result; the last one completes the future."""
        self._results[row] = result
        self._left -= 1
        if self._left == 0:
            with suppress(InvalidStateError):  # the caller cancelled the future just now
                self.future.set_result(self._results)

    def fail(self, error: BaseException) -> None:
        """Complete the future with an error unless it is done already."""
        with suppress(InvalidStateError):
            if not self.future.done():
                self.future.set_exception(error)

    @property
    def over(self) -> bool:
        """Tell whether no caller waits any more, because it left or because another row failed."""
        return self.future.done()


@dataclass(frozen=True, eq=False)
class QueuedRow:
    """One row in the queue."""

    request: PendingRequest[Any]
    row: int
    prompt: ServedPrompt
    input_ids: list[int]
    sampling: Sampling | None
    arrived: float = field(default_factory=time.monotonic)

    @property
    def width(self) -> int:
        """The columns that the row takes in a batch: prompt, input and the longest answer."""
        answer = self.sampling.max_tokens if self.sampling else self.prompt.longest_answer
        return self.prompt.virtual_tokens + len(self.input_ids) + answer

    @property
    def copies(self) -> int:
        """The rows that it takes in a forward: answers of several tokens need one row each."""
        if self.sampling is None and self.prompt.longest_answer > 1:
            return len(self.prompt.answers)
        return 1

    @property
    def kinds(self) -> frozenset[str]:
        """The prompt's ``PreparedPrompts.kinds``, which decide what rows can share a forward."""
        return self.prompt.prepared.kinds


class ServingEngine:
    """An engine that takes rows from any thread or event loop and runs them on its own thread."""

    def __init__(
        self,
        backbone: Backbone,
        limits: EngineLimits | None = None,
        observe: Observer = lambda kind, rows: None,
        first_token: FirstToken = lambda model, seconds: None,
    ) -> None:
        """Start the engine's thread.

        ``observe`` is called with the kind and the number of rows of each forward. ``first_token``
        is called with the registered model and the seconds from a row's arrival to its first token.
        """
        self.backbone = backbone
        self.limits = limits or EngineLimits()
        self._observe = observe
        self._first_token = first_token
        self._ranking: deque[QueuedRow] = deque()
        self._generating: deque[QueuedRow] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._batches: list[GenerationBatch] = []
        self._owners: dict[GenerationRow, QueuedRow] = {}
        self._thread = threading.Thread(target=self._loop, name="serving-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closed

    @property
    def waiting(self) -> int:
        """The number of rows that no batch has taken yet."""
        return len(self._ranking) + len(self._generating)

    @property
    def running(self) -> int:
        """The number of rows that are being generated."""
        return len(self._owners)

    async def classify(
        self, prompt: ServedPrompt, inputs: Sequence[list[int]]
    ) -> list[list[float]]:
        """Return for each input the probabilities [C] of the prompt's C answers.

        Raises Overloaded when the queue is full.
        """
        request: PendingRequest[list[float]] = PendingRequest(len(inputs))
        return await self._ask(request, self._ranking, prompt, inputs, None)

    async def complete(
        self,
        prompt: ServedPrompt,
        inputs: Sequence[list[int]],
        sampling: Sampling | Sequence[Sampling],
    ) -> list[Completion]:
        """Return one completion for each input.

        ``sampling`` is the same for all inputs, or one for each. Inputs that are the same list run
        once. Raises Overloaded when the queue is full.
        """
        request: PendingRequest[Completion] = PendingRequest(len(inputs))
        return await self._ask(request, self._generating, prompt, inputs, sampling)

    def stream(
        self,
        prompt: ServedPrompt,
        inputs: Sequence[list[int]],
        sampling: Sampling | Sequence[Sampling],
    ) -> AsyncIterator[tuple[int, Delta]]:
        """Return an iterator over the inputs' numbers and their deltas, as they are generated.

        The iterator ends when all rows have ended. Closing it early frees the rows. Raises
        Overloaded immediately, not while iterating, when the queue is full.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Delta] | None] = asyncio.Queue()

        def hear(event: tuple[int, Delta] | None) -> None:
            with suppress(RuntimeError):  # the event loop is closed, so nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, event)

        request: PendingRequest[Completion] = PendingRequest(
            len(inputs), lambda row, delta: hear((row, delta))
        )
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
        """Stop the thread; requests that still wait fail with Unreachable."""
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
        request: PendingRequest[Result],
        line: deque[QueuedRow],
        prompt: ServedPrompt,
        inputs: Sequence[list[int]],
        sampling: Sampling | Sequence[Sampling] | None,
    ) -> list[Result]:
        self._enqueue(line, request, prompt, inputs, sampling)
        return await asyncio.wrap_future(request.future)

    def _enqueue(
        self,
        line: deque[QueuedRow],
        request: PendingRequest[Result],
        prompt: ServedPrompt,
        inputs: Sequence[list[int]],
        sampling: Sampling | Sequence[Sampling] | None,
    ) -> None:
        samplings = sampling if isinstance(sampling, Sequence) else [sampling] * len(inputs)
        queued = [
            QueuedRow(request, row, prompt, ids, row_sampling)
            for row, (ids, row_sampling) in enumerate(zip(inputs, samplings, strict=True))
        ]
        with self._changed:
            if self._closed:
                raise Unreachable("the server is stopping")
            if self.waiting + len(queued) > self.limits.max_waiting:
                raise Overloaded(self.waiting)
            line.extend(queued)
            self._changed.notify()

    def _loop(self) -> None:
        while self._wait_for_work():
            if queued := self._take(self._ranking):
                self._guarded(queued, self._rank)
            if len(self._batches) < MAX_BATCHES and (
                queued := self._take(self._generating, list(self._owners.values()))
            ):
                self._guarded(queued, self._admit)
            for batch in list(self._batches):
                queued = [self._owners[row] for row in batch.rows]
                self._guarded(
                    queued,
                    lambda _, batch=batch: self._step(batch),  # type: ignore[misc]
                    batch,
                )

    def _wait_for_work(self) -> bool:
        """Block until there is something to run; return False when the engine is closed."""
        with self._changed:
            while not (self._closed or self._ranking or self._generating or self._batches):
                self._changed.wait()
            return not self._closed

    def _take(
        self, line: deque[QueuedRow], current_rows: Sequence[QueuedRow] = ()
    ) -> list[QueuedRow]:
        """Take the next rows from a queue, in order of arrival.

        Together with the running rows, the rows taken stay within the limits. Rows that can't share
        a forward with those taken keep their place in the queue. Rows that no caller waits for are
        dropped.
        """
        accepted: list[QueuedRow] = []
        postponed: list[QueuedRow] = []
        width = max((entry.width for entry in current_rows), default=0)
        rows = len(current_rows)
        kinds: frozenset[str] = frozenset()
        with self._changed:
            while line:
                entry = line.popleft()
                if entry.request.over:
                    continue
                if not self.backbone.shares_forward(kinds | entry.kinds):
                    postponed.append(entry)
                    continue
                width = max(width, entry.width)
                rows += entry.copies
                kinds |= entry.kinds
                too_large = rows > self.limits.max_rows or rows * width > self.limits.max_tokens
                if too_large and (accepted or current_rows):
                    postponed.append(entry)
                    break
                accepted.append(entry)
            line.extendleft(reversed(postponed))
        return accepted

    def _guarded(
        self,
        queued: list[QueuedRow],
        work: Callable[[list[QueuedRow]], None],
        batch: GenerationBatch | None = None,
    ) -> None:
        """Do some work; if it raises, fail the requests of its rows and keep the thread running."""
        try:
            work(queued)
        except Exception as error:
            log.exception("a batch of %d rows failed", len(queued))
            failed_ids = {id(entry) for entry in queued}
            self._batches = [entry for entry in self._batches if entry is not batch]
            self._owners = {
                row: entry for row, entry in self._owners.items() if id(entry) not in failed_ids
            }
            self._fail(queued, error)

    def _rank(self, queued: list[QueuedRow]) -> None:
        self._observe("classify", len(queued))
        probs = answer_probs(
            self.backbone, [entry.prompt for entry in queued], [entry.input_ids for entry in queued]
        )
        for entry, row in zip(queued, probs, strict=True):
            entry.request.deliver(entry.row, row)

    def _admit(self, queued: list[QueuedRow]) -> None:
        """Run the rows' inputs (prefill), then add the rows to a running batch or start a new one.

        Some models can't take the rows into a running batch.
        """
        rows = [
            GenerationRow(entry.prompt, entry.input_ids, entry.sampling or Sampling())
            for entry in queued
        ]
        self._score([row for row in rows if row.sampling.prompt_logprobs is not None])
        owners = dict(zip(rows, queued, strict=True))
        for row in [row for row in rows if not row.sampling.max_tokens]:
            row.end_at_once()
            self._tell(row, owners[row])
            self._deliver(row, owners.pop(row))
        if not owners:
            return
        self._observe("prefill", len(owners))
        entering = GenerationBatch(self.backbone, list(owners))
        if not any(batch.absorb(entering) for batch in self._batches):
            self._batches.append(entering)
        self._owners.update(owners)

    def _score(self, rows: Sequence[GenerationRow]) -> None:
        """Score the inputs of rows that ask for it; several rows of one input share the scores."""
        if not rows:
            return
        keys = [(id(row.prompt), id(row.input_ids), row.sampling.prompt_logprobs) for row in rows]
        distinct = dict(zip(keys, rows, strict=True))
        self._observe("score", len(distinct))
        scores = score_inputs(
            self.backbone,
            [row.prompt for row in distinct.values()],
            [row.input_ids for row in distinct.values()],
            [row.sampling.prompt_logprobs or 0 for row in distinct.values()],
        )
        scores_of = dict(zip(distinct, scores, strict=True))
        for key, row in zip(keys, rows, strict=True):
            row.input_scores = scores_of[key]

    def _step(self, batch: GenerationBatch) -> None:
        for row in batch.rows:
            row.abandoned = self._owners[row].request.over
        rows = [row for row in batch.rows if not row.abandoned]
        self._observe("generate", len(rows))
        ended_rows = batch.step()
        for row in rows:
            self._tell(row, self._owners[row])
        for row in ended_rows:
            self._deliver(row, self._owners.pop(row))
        if not batch.rows:
            self._batches.remove(batch)

    def _tell(self, row: GenerationRow, entry: QueuedRow) -> None:
        if len(row.made) == 1:
            self._first_token(entry.prompt.name, time.monotonic() - entry.arrived)
        if (
            entry.request.listener
            and not entry.request.over
            and row.failure is None
            and (news := row.pull())
        ):
            entry.request.listener(entry.row, news)

    def _deliver(self, row: GenerationRow, entry: QueuedRow) -> None:
        if row.completion is not None:
            entry.request.deliver(entry.row, row.completion)
        elif row.failure is not None:
            if not isinstance(row.failure, ConstraintFailed):
                log.error("generating a row failed", exc_info=row.failure)
            entry.request.fail(row.failure)

    def _fail(self, queued: Sequence[QueuedRow], error: BaseException) -> None:
        for entry in queued:
            entry.request.fail(error)
