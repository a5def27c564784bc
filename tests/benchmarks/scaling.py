"""Limits of a search at 1,000 GPUs, and of a service at 100,000 prompts and 10,000 requests/s.

docs/cluster/scaling.md draws the conclusions. Small parts are measured here, without Ray. The rest
is arithmetic (``Search``, ``Service``) over these measurements, over figures measured with Ray
before (docs/decisions/), and over assumptions. Every line says which of these it is.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from collections.abc import Callable, Sized
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import JobFailed
from orchestrator.job.space import TrialSpec
from orchestrator.registry import Registry
from orchestrator.search.state.trials import TrialRecord
from orchestrator.search.workers.broker import Broker, SubmittedTrial
from orchestrator.tuning.reports import Report
from tests.benchmarks.measure import Line, in_fresh_process
from tests.filled_store import fill

SPEC = TrialSpec("random", None, num_virtual_tokens=20, learning_rate=0.1, seed=0)
CHECKPOINT = bytes(1000)
KB, MB, GB = 1e3, 1e6, 1e9
MEASURED, EXTRAPOLATED, EARLIER, ASSUMED = "measured", "extrapolated", "measured earlier", "assumed"


@dataclass(frozen=True)
class Setting:
    """Sizes of the parts that are measured."""

    seats: tuple[tuple[int, int], ...] = ((1, 4), (16, 8), (128, 8), (1000, 8))
    """Pairs of workers and slots of a worker."""
    over: tuple[int, ...] = (1000, 10_000, 100_000)
    """Numbers of trials of the search that have ended."""
    reports: int = 400
    prompts: tuple[int, ...] = (1000, 10_000, 100_000)
    asked: int = 2000
    registered: tuple[int, ...] = (1000, 10_000)


TOY = Setting(
    seats=((1, 2), (2, 2)), over=(10,), reports=8, prompts=(20,), asked=20, registered=(20,)
)


@dataclass(frozen=True)
class Search:
    """A search on many GPUs: the load on its one driver, and the limits of that driver."""

    gpus: int = 1000
    slots: int = 8
    """Trials that a GPU trains together (placement.GPU_SLOTS)."""
    round_s: float = 60.0
    """Seconds between a worker's reports; a round is ``evaluate_every`` steps."""
    trials: int = 100_000
    reports: int = 10
    """Reports of a trial."""

    @property
    def seats(self) -> int:
        return self.gpus * self.slots

    def demand(self) -> float:
        """Return the reports a second once every slot is taken."""
        return self.seats / self.round_s

    def fed(self, capacity: float) -> float:
        """Return the GPUs that a driver keeps busy at ``capacity`` reports a second."""
        return capacity * self.round_s / self.slots

    def shortest_round(self, capacity: float) -> float:
        """Return the seconds of the shortest round at which all GPUs are kept busy."""
        return self.seats / capacity

    def waiting_calls(self) -> int:
        """Return the calls that wait in the broker: one a seated trial and one a worker."""
        return self.seats + self.gpus

    def most_gpus(self, calls: int) -> int:
        """Return the GPUs whose waiting calls fit into an actor with room for ``calls`` calls."""
        return calls // (self.slots + 1)

    def driver_bytes(self, each: float) -> float:
        return each * self.trials * self.reports


@dataclass(frozen=True)
class Service:
    """A service of many prompts: memory and start of a replica, and processors for requests."""

    prompts: int = 100_000
    rate: float = 10_000.0
    """Requests a second."""
    tokens: int = 20
    """Virtual tokens of a prompt."""
    layers: int = 16
    kv_width: int = 512
    """Key heads times their width."""
    parameters: float = 1.24e9
    scalar_bytes: int = 2
    input_tokens: int = 50
    operations: float = 989e12
    """A GPU's operations a second at best, in bfloat16."""
    utilisation: float = 0.3

    def prompt_bytes(self) -> int:
        """Return the bytes of keys and values of one prompt."""
        return 2 * self.layers * self.kv_width * self.tokens * self.scalar_bytes

    def memory(self, beside: float) -> float:
        """Return the bytes of a replica that holds every prompt.

        ``beside``: bytes of bookkeeping a prompt.
        """
        return self.prompts * (self.prompt_bytes() + beside)

    def held(self, limit: float) -> int:
        """Return the number of prompts within a limit on the bytes of keys and values."""
        return int(limit // self.prompt_bytes())

    def cores(self, seconds: float) -> float:
        """Return the processor cores for all requests, at ``seconds`` of CPU time each."""
        return self.rate * seconds

    def gpus(self) -> float:
        """Return the GPUs for one forward over the inputs.

        A forward takes 2 operations a parameter and token, at the assumed utilisation.
        """
        return (
            self.rate
            * self.input_tokens
            * 2
            * self.parameters
            / (self.operations * self.utilisation)
        )


def lines(setting: Setting, only: str = "") -> list[Line]:
    parts: dict[str, Callable[[], list[Line]]] = {
        "search": lambda: search_lines(setting),
        "service": lambda: service_lines(setting),
    }
    found = [line for name, part in parts.items() if only in name for line in part()]
    return [*found, load_of_machine()]


# The search.

EARLIER_RESULTS = 25.0  # results a second through Tune, on two cores
EARLIER_DRIVER_BYTES = 26e3  # bytes a result
ACTOR_CALLS = 100_000  # CALLS of search/workers/running.py
RAY_RESULTS = 500.0  # results a second, Ray's own figure for a whole cluster without logging


def search_lines(setting: Setting) -> list[Line]:
    """Measure the broker with growing numbers of seats and of trials, then compute 1,000 GPUs."""
    seats = [_broker_line(*seats, over=0, reports=setting.reports) for seats in setting.seats]
    over = [
        _broker_line(*setting.seats[1], over=over, reports=setting.reports) for over in setting.over
    ]
    return seats + over + search_arithmetic(seats[-1].kept["rate"], setting.seats[-1])


def _broker_line(workers: int, slots: int, over: int, reports: int) -> Line:
    name = f"broker: {workers} workers of {slots} slots, {over} trials over"
    each = {
        text: asyncio.run(deliver(workers, slots, over, reports, together)) / reports
        for text, together in (("at once", True), ("in turn", False))
    }
    shown: dict[str, float | str] = {
        f"{text}, CPU ms a report": 1000 * spent for text, spent in each.items()
    }
    return Line(
        name,
        {**shown, "kind": MEASURED},
        {"rate": 1 / each["in turn"], "burst": 1 / each["at once"]},
    )


async def deliver(workers: int, slots: int, over: int, wanted: int, together: bool) -> float:
    """Let workers report and trials continue until ``wanted`` reports were decided.

    Returns the CPU time since all trials were seated. With ``together`` all workers report at the
    same moment, otherwise one after another.
    """
    seats = workers * slots
    broker = Broker(over + seats)
    for number in range(over):
        record = TrialRecord(f"over{number}", SPEC)
        broker.trials[record.id] = SubmittedTrial(number, record, released=True)
    for number in range(seats):
        await broker.submit(f"t{number}", over + number, SPEC)
    decided, start, spent = 0, 0.0, 0.0
    ready, turn = asyncio.Barrier(workers), nullcontext() if together else asyncio.Lock()

    async def trial(name: str) -> None:
        nonlocal decided, spent
        with suppress(JobFailed):  # raised once the search is over
            while await broker.next_report(name) is not None:
                decided += 1
                await broker.decide(name, True)
                if decided == wanted:
                    spent = time.process_time() - start
                    await broker.finish()

    async def worker(name: str) -> None:
        nonlocal start
        await broker.join(name, slots)
        orders, step = await broker.next_orders(name), 0
        seated = [seat.trial for seat in orders.seat]
        await ready.wait()
        start = start or time.process_time()
        while not orders.stop:
            step += 1
            metrics = {"loss": 1.0, "accuracy": 0.5}
            made = [
                Report(one, step, metrics, 1.0, step, metrics, 0.5, CHECKPOINT) for one in seated
            ]
            async with turn:
                orders = await broker.next_orders(name, made)

    await asyncio.gather(
        *(trial(f"t{number}") for number in range(seats)),
        *(worker(f"w{number}") for number in range(workers)),
    )
    return spent


def search_arithmetic(broker: float, at: tuple[int, int]) -> list[Line]:
    """Return the lines for 1,000 GPUs.

    They follow from ``broker``, the broker's reports a second at ``at`` (workers, slots), and from
    earlier measurements.
    """
    search = Search()
    return [
        _says("reports/s that 1,000 GPUs make, rounds of 60 s", search.demand(), ASSUMED),
        _says("reports/s that the driver takes (Tune, logging)", EARLIER_RESULTS, EARLIER),
        _says("GPUs that this keeps busy", search.fed(EARLIER_RESULTS), EXTRAPOLATED),
        _says(
            "seconds of a round that keep 1,000 busy",
            search.shortest_round(EARLIER_RESULTS),
            EXTRAPOLATED,
        ),
        _says(
            "the same at Ray's own 500 results/s", search.shortest_round(RAY_RESULTS), EXTRAPOLATED
        ),
        _says(f"reports/s of the broker at {at[0]} x {at[1]} slots", broker, MEASURED),
        _says("seconds of a round that it allows", search.shortest_round(broker), EXTRAPOLATED),
        _says("calls that wait in the broker", search.waiting_calls(), EXTRAPOLATED),
        _says(
            "GPUs at which the broker's 100,000 calls are full",
            search.most_gpus(ACTOR_CALLS),
            EXTRAPOLATED,
        ),
        _says(
            "GB of the driver, 100,000 trials of 10 reports",
            search.driver_bytes(EARLIER_DRIVER_BYTES) / GB,
            EXTRAPOLATED,
        ),
    ]


# The service.

# Classify requests a second through Serve on two busy cores, model included; 106 to 130 measured.
EARLIER_SERVE = 118.0
EARLIER_UVICORN = 400.0  # the same without Serve
DEFAULT_BYTES = 2 << 30  # MAX_BYTES of serving/prompts/store.py
POLL_S = 2.0


def service_lines(setting: Setting) -> list[Line]:
    """Measure stores and registries of growing size, then compute the large service.

    The large service has 100,000 prompts and 10,000 requests a second.
    """
    stores = [_store_line(count, setting.asked) for count in setting.prompts]
    registries = [_registry_line(count) for count in setting.registered]
    return stores + registries + service_arithmetic(stores[-1].kept, registries[-1].kept)


def _store_line(count: int, asked: int) -> Line:
    found = in_fresh_process("tests.benchmarks.prompt_stores", {"count": count, "asked": asked})
    shown: dict[str, float | str] = {
        "kB a prompt": found["resident"] / KB,
        "keys, values": found["keys and values"] / KB,
        "load, ms": 1000 * found["load"],
        "follow, ms": 1000 * found["follow"],
        "lookup, us": 1e6 * found["lookup"],
        "models, ms": 1000 * found["listing"],
        "metrics, ms": 1000 * found["metrics"],
        "metrics, MB": found["metrics, bytes"] / MB,
        "parse, us": 1e6 * found["parse"],
        "encode, us": 1e6 * found["encode"],
        "request, us": 1e6 * found["request"],
        "kind": MEASURED,
    }
    return Line(f"store of {count} prompts", shown, {**found, "count": count})


def _registry_line(count: int) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        registry = Registry(uri, cache_dir=Path(folder, "cache"))
        registry.check()
        fill(uri, count, versions=1)
        _cpu(registry.live, count)  # the first call also imports modules
        tables = _cpu(registry.live, count)
        seconds = _cpu(registry._asked, count)  # as an MLflow server is read
    shown: dict[str, float | str] = {
        "tables, CPU s": tables,
        "client, CPU s": seconds,
        "client, ms a model": 1000 * seconds / count,
        "kind": MEASURED,
    }
    return Line(
        f"registry of {count} models", shown, {"tables": tables, "seconds": seconds, "count": count}
    )


def _cpu(read: Callable[[], Sized], count: int) -> float:
    """Return the seconds of CPU time of a listing.

    Raises AssertionError unless the listing has ``count`` models.
    """
    start = time.process_time()
    found = len(read())
    if found != count:
        raise AssertionError(f"{found} of {count} models are listed")
    return time.process_time() - start


def service_arithmetic(store: dict[str, float], registry: dict[str, float]) -> list[Line]:
    """Return the lines for 100,000 prompts and 10,000 requests a second.

    They follow from the largest store and the largest registry that were measured.
    """
    service = Service()
    beside = store["resident"] - store["keys and values"]
    kind = MEASURED if store["count"] == service.prompts else EXTRAPOLATED
    poll = registry["seconds"] * service.prompts / registry["count"]
    return [
        _says(
            "kB of keys and values a prompt, 1B model, 20 tokens",
            service.prompt_bytes() / KB,
            EXTRAPOLATED,
        ),
        _says("GB of a replica that holds 100,000", service.memory(beside) / GB, EXTRAPOLATED),
        _says("GB of them that are bookkeeping, on the host", service.prompts * beside / GB, kind),
        _says("prompts within the default 2 GiB", service.held(DEFAULT_BYTES), EXTRAPOLATED),
        _says(
            "minutes of a replica's start, the toy model's load",
            store["load"] * service.prompts / 60,
            kind,
        ),
        _says("seconds of CPU of one poll of a server", poll, EXTRAPOLATED),
        _says(
            "seconds of CPU of one poll of tables",
            poll * registry["tables"] / registry["seconds"],
            EXTRAPOLATED,
        ),
        _says(
            "processors that polling every 2 s keeps busy, a replica", poll / POLL_S, EXTRAPOLATED
        ),
        _says(
            "models with which a poll every 2 s keeps pace",
            service.prompts * POLL_S / poll,
            EXTRAPOLATED,
        ),
        _says(
            "seconds of CPU of one scrape of /metrics",
            store["metrics"] * service.prompts / store["count"],
            kind,
        ),
        _says(
            "cores for 10,000 requests/s, without Serve and model",
            service.cores(store["request"]),
            EXTRAPOLATED,
        ),
        _says(
            "cores the same with uvicorn and a 3M model",
            2 * service.rate / EARLIER_UVICORN,
            EARLIER,
        ),
        _says("cores the same through Serve", 2 * service.rate / EARLIER_SERVE, EARLIER),
        _says("H100s for the forwards of 50 tokens at 30 %", service.gpus(), ASSUMED),
    ]


def _says(name: str, value: float, kind: str) -> Line:
    return Line(
        name,
        {"figure": value if value < 1000 else f"{math.floor(value + 0.5):,}", "kind": kind},
        {"value": value},
    )


def load_of_machine() -> Line:
    """Return the load of the machine.

    If it exceeds the number of processors, times are less reliable than ratios.
    """
    one, five, _ = os.getloadavg()
    return Line(
        "load of the machine",
        {"1 min": one, "5 min": five, "processors": float(os.cpu_count() or 1)},
    )
