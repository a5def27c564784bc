"""Starting Ray in the background of other work: what it provides and that nothing remains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from ray_state import eventually
from small_jobs import write_job

from orchestrator.cluster.ray_internals.settings import NICENESS

pytestmark = pytest.mark.ray  # every test here starts its own Ray

LIMIT_S = 150.0  # reached only when something hangs
START = """
import os, signal, sys, time
import psutil, ray
from orchestrator.cluster.session import FEW_CORES, ray_beside, started_here
from orchestrator.search.workers.prestart import PROCESSES, make_ready
from orchestrator.utils.interrupts import Interrupts

def children():
    return psutil.Process().children(recursive=True)

def alive(processes):
    return psutil.wait_procs(processes, 30)[1]

"""
USED = """
@ray.remote
class Probe:
    def loaded(self):
        return "orchestrator.search.workers.train_group" in sys.modules

with ray_beside(then=make_ready, niceness=3) as up:
    assert up() and started_here()
    deadline = time.monotonic() + 60
    ready = 0
    while ready < PROCESSES and time.monotonic() < deadline:
        ready = sum(child.name().startswith("ray::IDLE") for child in children())
        time.sleep(0.1)
    print(ready >= PROCESSES, ray.get(Probe.remote().loaded.remote()) == \
(os.cpu_count() <= FEW_CORES))
    began = children()
    idle = [child for child in began if child.name().startswith("ray::IDLE")]
    print({child.nice() - os.nice(0) for child in idle})
print(started_here(), ray.is_initialized(), alive(began))
"""
REFUSED = """
try:
    with ray_beside() as up:
        while not children():
            time.sleep(0.01)
        raise ValueError("a column that is not there")
except ValueError as error:
    print(error, ray.is_initialized(), alive(children()))
"""
STILL_ASKING = """
def asks_late():
    time.sleep(0.5)
    print(len(ray.nodes()))

try:
    with ray_beside(then=asks_late) as up:
        up()
        raise ValueError("a column that is not there")
except ValueError as error:
    print(error, ray.is_initialized(), alive(children()))
"""
STILL_CALLED = """
from orchestrator.cluster.ray_threads import RayThread

@ray.remote
def slow():
    time.sleep(2)
    return "heard"

class Asks(RayThread):
    def run(self):
        print(ray.get(slow.remote()))

try:
    with ray_beside() as up:
        up()
        Asks("asks").start()
        raise ValueError("a column that is not there")
except ValueError as error:
    print(error, ray.is_initialized(), alive(children()))
"""
STUCK = """
from orchestrator.cluster import session
from orchestrator.cluster.ray_threads import RayThread, end_ray_process

@ray.remote
def endless():
    time.sleep(1000)

class Asks(RayThread):
    def run(self):
        ray.get(endless.remote())

session.THREADS_S = 1.0
with ray_beside() as up:
    up()
    Asks("asks").start()
    time.sleep(1)
print("left", flush=True)
end_ray_process(0)
"""
TERMINATED = """
try:
    with Interrupts(), ray_beside() as up:
        while not started_here():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", ray.is_initialized(), alive(children()))
"""


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """A folder for Ray's logs and sockets; socket paths have to be short."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def run(arguments: list[str], ray_folder: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder)}
    environment.pop(NICENESS, None)  # left by a server's test
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


@pytest.mark.parametrize(
    ("code", "said"),
    [
        pytest.param(USED, "True True\n{3}\nFalse False []\n", id="used"),
        pytest.param(REFUSED, "a column that is not there False []\n", id="refused"),
        pytest.param(STILL_ASKING, "1\na column that is not there False []\n", id="still asking"),
        pytest.param(
            STILL_CALLED, "heard\na column that is not there False []\n", id="still called"
        ),
        pytest.param(STUCK, "left\n", id="stuck"),
        pytest.param(TERMINATED, "interrupted False []\n", id="terminated"),
    ],
)
def test_it_starts_beside_other_work(
    code: str, said: str, ray_folder: Path, tmp_path: Path
) -> None:
    """Ray starts in the background with warm worker processes, and all of them end with it.

    The workers have the niceness that was asked for. This holds at the normal end and when the
    other work fails or is interrupted. Calling the handle after the end starts no second Ray.
    Threads that are still calling Ray are waited for; a call that never returns ends with the
    process.
    """
    ran = run(["-c", START + code], ray_folder, tmp_path)
    assert (ran.returncode, ran.stdout) == (0, said), ran.stderr
    assert "SIGTERM received" not in ran.stderr
    assert eventually(lambda: not processes_of(ray_folder)), processes_of(ray_folder)


REFUSED_LATE = """
import sys
from orchestrator.cli import main
from orchestrator.errors import BadInput
from orchestrator.cli.progress import ConsoleProgress

def stage(self, text):
    if text.startswith("loading the base model"):
        raise BadInput("not this one", "take another")

ConsoleProgress.stage = stage
main()
"""


def test_a_search_refused_as_its_workers_start_says_so(ray_folder: Path, tmp_path: Path) -> None:
    """A search refused while Train is starting workers ends them and Ray; the error comes last."""
    job = str(write_job(tmp_path))
    for _ in range(2):  # the failure that this test guards against occurred in one run of three
        ran = run(["-c", REFUSED_LATE, "run", job, "-q"], ray_folder, tmp_path)
        assert (ran.returncode, ran.stderr) == (
            2,
            "bad input: not this one\n  next: take another\n",
        )
        assert eventually(lambda: not processes_of(ray_folder)), processes_of(ray_folder)


def test_a_search_s_processes_have_its_environment(ray_folder: Path, tmp_path: Path) -> None:
    """Workers inherit their environment, without a Ray runtime environment for each.

    Ray would start every such process in two steps. The search completes and no process remains.
    """
    ran = run(
        ["-m", "orchestrator", "run", str(write_job(tmp_path)), "--json", "-q"],
        ray_folder,
        tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    model = json.loads(ran.stdout)["model"]
    assert (model["name"], model["version"], model["alias"]) == ("tiny", 1, "champion")
    (log,) = (ray_folder / "ray").glob("session_2*/logs/runtime_env_agent.log")
    agent = log.read_text()
    assert "Starting runtime env agent" in agent and "Creating runtime env" not in agent
    assert eventually(lambda: not processes_of(ray_folder)), processes_of(ray_folder)


def processes_of(ray_folder: Path) -> list[psutil.Process]:
    """Return the processes that have the folder in their command line, whatever their parent is."""
    found = psutil.process_iter(["cmdline"])
    return [
        process for process in found if str(ray_folder) in " ".join(process.info["cmdline"] or [])
    ]
