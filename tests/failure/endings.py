"""Searches that end early in every known way, each in a process: their output and remains.

    python -m failure.endings --count 20 --seed 7  # in tests/, with the project on the path
    python -m failure.endings --seed 7 --only 3 11  # the same attempts again, by their numbers

An attempt is a kind of ending, a moment of the search and a delay after it. The moment and the
delay are drawn from the seed and the attempt's number; the kind follows from the number.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
import psutil
from mlflow_server import Server
from models import save_model
from small_jobs import write_job

from orchestrator.registry.runs.searches import HISTORY_EXPERIMENT as LEDGER

LIMIT_S = 180.0  # for a whole attempt
ENDS_S = 75.0  # from the action to the end of the search
GONE_S = 20.0  # from the end of the search to that of its processes
TRAIN = {"steps": 8, "batch_size": 4, "evaluate_every": 4}
MOMENTS = (
    "reading data",
    "starting Ray",
    "loading the base model",
    "without a prompt",
    "t000 step ",
    "evaluating the best",
    "registering",
    "drawing the report",
)
DELAYS_S = (0.0, 0.2, 1.0, 3.0)  # a delay is drawn between 0 and one of these
MESSAGES = {
    0: "",
    1: "failed: ",
    2: "bad input: ",
    3: "unreachable: ",
    130: "interrupted",
    143: "interrupted",
}
NEVER = (
    "Traceback",
    "unforeseen error",
    "core_worker",
    "*** SIG",
    "Segmentation",
    "Fatal Python error",
)

# The real program, except that with PATIENCE_S it waits seconds, not minutes, for a lost MLflow.
COMMAND = """
import os
import orchestrator.search.result as result
from orchestrator.errors import BadInput
from orchestrator.cli.progress import ConsoleProgress
from orchestrator.registry import Registry

if "PATIENCE_S" in os.environ:
    result.SOON_S, result.REGISTRY_PATIENCE_S = 1.0, float(os.environ["PATIENCE_S"])
    for verb in (Registry.start_search, Registry.resume_search):
        verb.__kwdefaults__["patience"] = float(os.environ["PATIENCE_S"])

stage = ConsoleProgress.stage

def refused(self, text):
    stage(self, text)
    if text.startswith(os.environ["REFUSED_AT"]):
        raise BadInput("refused late", "nothing to do")

if "REFUSED_AT" in os.environ:
    ConsoleProgress.stage = refused

from orchestrator.cli import main
main()
"""


@dataclass(frozen=True)
class Ending:
    """A kind of ending: its allowed exit codes and what its message has to name."""

    codes: tuple[int, ...]
    names: str = ""


ENDINGS = {
    "experiment in the trash": Ending((2,), "was deleted in MLflow"),
    "ledger in the trash": Ending((2,), "was deleted in MLflow"),
    "refused after the workers' start": Ending((2,), "refused late"),
    "weights that a worker can't load": Ending((1, 2), "base_model"),
    "worker killed": Ending((0,)),
    "Ctrl-C": Ending((130, 0)),
    "Ctrl-C twice": Ending((130, 0)),
    "SIGTERM": Ending((143, 0)),
    "SIGTERM twice": Ending((143, 0)),
    "server lost": Ending((3, 0)),
    "server lost, then Ctrl-C": Ending((130, 3, 0)),
    "Ctrl-C in resume": Ending((130, 0)),
    "SIGTERM twice in resume": Ending((143, 0)),
}
SHARE = (
    *(
        "experiment in the trash",
        "refused after the workers' start",
        "Ctrl-C",
        "SIGTERM",
        "server lost",
    ),
    *(
        "Ctrl-C twice",
        "SIGTERM twice",
        "weights that a worker can't load",
        "Ctrl-C",
        "refused after the workers' start",
    ),
    *(
        "SIGTERM",
        "ledger in the trash",
        "Ctrl-C twice",
        "SIGTERM twice",
        "server lost, then Ctrl-C",
    ),
    *(
        "Ctrl-C in resume",
        "worker killed",
        "server lost",
        "SIGTERM twice in resume",
        "experiment in the trash",
    ),
)
"""The kinds of twenty attempts in a row; a kind may be listed several times."""


@dataclass(frozen=True)
class Attempt:
    """One attempt: its kind, the progress line to wait for, and the pauses before acting."""

    number: int
    kind: str
    moment: str
    delay_s: float
    again_s: float

    @classmethod
    def drawn(cls, seed: int, number: int) -> Attempt:
        """Draw the attempt of this number; equal seeds give equal attempts."""
        choose = random.Random(f"{seed} {number}")
        moment = choose.choice(MOMENTS)
        delay_s, again_s = (choose.uniform(0.0, choose.choice(DELAYS_S)) for _ in range(2))
        return cls(number, SHARE[number % len(SHARE)], moment, delay_s, again_s)

    def __str__(self) -> str:
        when = f"{self.delay_s:.2f} s after {self.moment!r}, again {self.again_s:.2f} s later"
        return f"attempt {self.number}: {self.kind}, {when}"


@dataclass
class Ended:
    """The result of an attempt; ``problems`` is empty when everything was right."""

    attempt: Attempt
    code: int | None
    seconds: float
    said: str
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        outcome = f"{self.attempt}: exit code {self.code} after {self.seconds:.1f} s"
        return (
            outcome if not self.problems else f"{outcome}; {'; '.join(self.problems)}\n{self.said}"
        )


class Ground:
    """The model, the job and the MLflow stores from which attempts are set up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = save_model(folder / "model")
        self.stores = folder / "stores"
        self.stores.mkdir()
        self._make_store("empty", "")
        self._make_store("experiment in the trash", "tiny")
        self._make_store("ledger in the trash", LEDGER)
        self.interrupted = folder / "interrupted"
        self.resumed = folder / "resumed"

    def _make_store(self, name: str, deleted: str) -> None:
        file = self.stores / f"{name}.db"
        if deleted:
            shutil.copyfile(self.stores / "empty.db", file)  # creating the schema takes seconds
        client = mlflow.MlflowClient(f"sqlite:///{file}")
        client.search_experiments(max_results=1)
        if deleted:
            client.delete_experiment(client.create_experiment(deleted))

    def lay_out(self, folder: Path, kind: str) -> Path:
        """Write a job with its own model and store into a folder; return the job's file."""
        store = kind if (self.stores / f"{kind}.db").exists() else "empty"
        shutil.copyfile(self.stores / f"{store}.db", folder / "mlflow.db")
        shutil.copytree(self.model, folder / "model")
        return write_job(
            folder, base_model__id=str(folder / "model"), train=TRAIN, search__trials=2,
            search__scheduler="fifo", search__few_shot=0, resources__trials_per_worker=2,
        )  # fmt: skip

    def interrupted_search(self) -> Path:
        """Return a folder with a search interrupted half-way.

        The folder always has the same path, since the search's files have absolute addresses in
        them.
        """
        shutil.rmtree(self.resumed, ignore_errors=True)
        if not self.interrupted.exists():
            self.resumed.mkdir()
            self.lay_out(self.resumed, "")
            attempt = Attempt(-1, "SIGTERM", "t000 step ", 0.0, 0.0)
            ended = Process(self.resumed, ["run", "job.yaml"]).end_by(attempt, to_the_process)
            assert ended.code == 143 and (self.resumed / ".orchestrator").exists(), ended
            shutil.rmtree(self.resumed / "ray")  # Ray's own folder, with sockets and links
            shutil.move(self.resumed, self.interrupted)
        shutil.copytree(self.interrupted, self.resumed)
        return self.resumed


class Process:
    """``orchestrator`` as a process started by a terminal, with its own Ray in its folder."""

    def __init__(self, folder: Path, arguments: Sequence[str], **environment: str) -> None:
        self.folder = folder
        self.lines: list[str] = []
        self._news = threading.Condition()
        self._over = False
        self.out = folder / "out.txt"
        project = str(Path(__file__).parents[2])
        paths = os.pathsep.join([project, *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {"RAY_TMPDIR": str(folder), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **environment}
        with self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", COMMAND, *arguments],
                cwd=folder, env={**os.environ, **own}, text=True,
                stdout=out, stderr=subprocess.PIPE,
                start_new_session=True, preexec_fn=heed_interrupts,
            )  # fmt: skip
        self.started = time.monotonic()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()

    def reaches(self, moment: str) -> bool:
        """Wait for a line of progress; return False if the process ended without it."""
        with self._news:
            self._news.wait_for(
                lambda: self._over or any(moment in line for line in self.lines), LIMIT_S
            )
            return any(moment in line for line in self.lines)

    def end_by(self, attempt: Attempt, *means: Callable[[Process], None]) -> Ended:
        """Wait for the attempt's moment, apply the means one after another, and await the end."""
        acted = time.monotonic()
        if means and self.reaches(attempt.moment):
            for pause, mean in zip((attempt.delay_s, attempt.again_s), means, strict=False):
                time.sleep(pause)
                acted = time.monotonic()
                if self.process.poll() is None:
                    mean(self)
        limit = ENDS_S if means else LIMIT_S
        problems = []
        try:
            self.process.wait(timeout=max(1.0, acted + limit - time.monotonic()))
        except subprocess.TimeoutExpired:
            problems.append(f"not ended within {limit:.0f} s; {self.stacks()}")
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        code, seconds = self.process.returncode, time.monotonic() - self.started
        problems += self._left()
        with self._news:
            self._news.wait_for(lambda: self._over, 5.0)
        said = f"--- stderr\n{''.join(self.lines)}--- stdout\n{self.out.read_text()}"
        return Ended(attempt, code, seconds, said, problems)

    def stacks(self) -> str:
        """Return the stacks of a process that hangs, if py-spy is installed."""
        if not (spy := shutil.which("py-spy")):
            return "no py-spy to tell where"
        return subprocess.run(
            [spy, "dump", "--pid", str(self.process.pid)],
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout

    def own_processes(self) -> list[psutil.Process]:
        """Return living processes that work in the folder or have it in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                at_work = Path(process.cwd()).is_relative_to(self.folder)
                told = str(self.folder) in " ".join(process.cmdline())
                lives = process.status() != psutil.STATUS_ZOMBIE
            except (psutil.Error, OSError):
                continue
            if lives and (at_work or told):
                found.append(process)
        return found

    def _left(self) -> list[str]:
        deadline = time.monotonic() + GONE_S
        while (left := self.own_processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        names = [
            f"{process.pid} {' '.join(process.cmdline())[:60]}"
            for process in left
            if process.is_running()
        ]
        for process in left:
            process.kill()
        return [f"processes are left: {', '.join(names)}"] if names else []


def heed_interrupts() -> None:
    """Restore Python's SIGINT handling, as in a terminal.

    Background jobs of a shell script ignore SIGINT and pass this on to their children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def to_the_group(process: Process) -> None:
    """Press Ctrl-C: a terminal signals every process of the foreground group."""
    os.killpg(process.process.pid, signal.SIGINT)


def to_the_process(process: Process) -> None:
    """Send SIGTERM to the search's process alone."""
    process.process.send_signal(signal.SIGTERM)


def spoil_weights(process: Process) -> None:
    """Truncate the weights, after the checks and before a worker reads them."""
    for file in (process.folder / "model").glob("*.safetensors"):
        os.truncate(file, file.stat().st_size // 2)


def kill_worker(process: Process) -> None:
    """Kill the worker that Train started, if there is one, with SIGKILL."""
    for child in psutil.Process(process.process.pid).children(recursive=True):
        with suppress(psutil.Error):  # a child that ends meanwhile
            if "TrainWorker" in " ".join(child.cmdline()):
                child.kill()


SIGNALS: dict[str, tuple[Callable[[Process], None], ...]] = {
    "Ctrl-C": (to_the_group,),
    "Ctrl-C twice": (to_the_group, to_the_group),
    "SIGTERM": (to_the_process,),
    "SIGTERM twice": (to_the_process, to_the_process),
    "worker killed": (kill_worker,),
}


def made(attempt: Attempt, ground: Ground, folder: Path) -> Ended:
    """Make the attempt and return its result."""
    kind = attempt.kind
    if kind.endswith(" in resume"):
        return Process(ground.interrupted_search(), ["resume", "latest"]).end_by(
            attempt, *SIGNALS[kind.removesuffix(" in resume")]
        )
    arguments = ["run", str(ground.lay_out(folder, kind))]
    if kind.startswith("server lost"):
        return _without_server(attempt, folder, arguments)
    if kind.startswith("weights"):
        at_start = Attempt(attempt.number, kind, "starting Ray", 0.0, 0.0)
        return Process(folder, arguments).end_by(at_start, spoil_weights)
    if kind.startswith("refused"):
        stage = random.Random(attempt.number).choice(
            ["loading the base model", "evaluating the best", "registering"]
        )
        return Process(folder, arguments, REFUSED_AT=stage).end_by(attempt)
    return Process(folder, arguments).end_by(attempt, *SIGNALS.get(kind, ()))


def _without_server(attempt: Attempt, folder: Path, arguments: Sequence[str]) -> Ended:
    server = Server(folder, f"sqlite:///{folder}/mlflow.db").start()

    def lose(process: Process) -> None:
        server.stop()

    means = (lose, to_the_group) if "Ctrl-C" in attempt.kind else (lose,)
    try:
        process = Process(folder, arguments, MLFLOW_TRACKING_URI=server.uri, PATIENCE_S="3")
        return process.end_by(attempt, *means)
    finally:
        server.stop()


def judged(ended: Ended, folder: Path) -> Ended:
    """Add every mistake of the ending to its problems and return it."""
    ending, code, said = ENDINGS[ended.attempt.kind], ended.code, ended.said
    if code not in ending.codes:
        ended.problems.append(f"exit code {code} is none of {ending.codes}")
    elif code and f"\n{MESSAGES[code]}" not in said:
        ended.problems.append(f"no message that begins with {MESSAGES[code]!r}")
    elif code and ending.names not in said:
        ended.problems.append(f"the message does not name {ending.names!r}")
    ended.problems += [f"it says {text!r}" for text in NEVER if text in said]
    if not ended.attempt.kind.startswith("server lost"):
        ended.problems += _running_runs(folder)
    return ended


def _running_runs(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "mlflow.db") as store:
        count = store.execute(
            "SELECT count(*) FROM runs WHERE status = 'RUNNING' AND name NOT LIKE 'aliases of %'"
        )
        (running,) = count.fetchone()
    return [f"{running} MLflow runs are RUNNING"] if running else []


def endings(count: int, seed: int, only: Sequence[int] = ()) -> Iterator[Ended]:
    """Make the attempts one after another and yield their results."""
    with scratch() as home:
        ground = Ground(home)
        for number in only or range(count):
            attempt = Attempt.drawn(seed, number)
            with scratch() as folder:
                ended = made(attempt, ground, folder)
                place = ground.resumed if attempt.kind.endswith(" in resume") else folder
                yield judged(ended, place)


@contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder with a short name, since Ray's sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="end-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Make attempts and print their results, with the whole output of wrong ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--count", type=int, default=len(SHARE))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="*", default=())
    options = parser.parse_args()
    wrong = []
    for ended in endings(options.count, options.seed, options.only):
        print(ended, flush=True)
        if ended.problems:
            wrong.append(ended.attempt.number)
    print(json.dumps({"wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
