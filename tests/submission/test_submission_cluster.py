"""Jobs on a real Ray cluster: a head and a worker in separate networks, with a token."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from mlflow.entities import Run
from ray_processes import RayProcesses, free_ports, ray_processes
from small_jobs import Said, close, search_runs, write_job

from orchestrator.cluster.submit.outcome import MARK

LIMIT_S = 250.0  # reached only when something hangs
HOURS = {
    "train": {"steps": 1_000_000, "batch_size": 4, "evaluate_every": 10},
    "search__scheduler": "fifo",
}

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayProcesses]:
    with ray_processes() as made:
        yield made


class Orchestrator:
    """Runs the command line on the head, in a separate process."""

    def __init__(self, cluster: RayProcesses, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.home = folder / "home"

    def start(self, *arguments: Any, **variables: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "orchestrator",
            *map(str, arguments),
            "--address",
            self.cluster.url,
        ]
        code = {"PYTHONPATH": str(Path(__file__).parents[2])}
        return subprocess.Popen(
            self.cluster.network.inside(0, command),
            env=self.cluster.environment | code | variables, cwd=self.folder,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            preexec_fn=heed_interrupts,
        )  # fmt: skip

    def __call__(self, *arguments: Any, **variables: str) -> Said:
        process = self.start(*arguments, **variables)
        try:
            out, err = process.communicate(timeout=LIMIT_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert "Traceback" not in err, err
        return Said(process.returncode, out, err)

    @property
    def runs(self) -> list[Run]:
        return search_runs(f"sqlite:///{self.home}/mlflow.db")


@dataclass(frozen=True)
class Ran:
    """A job that was submitted twice, with the output of both submissions."""

    job: Path
    orchestrator: Orchestrator
    first: Said
    second: Said


@pytest.fixture(scope="module")
def ran(cluster: RayProcesses, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Run four trials, one at a time on each of two nodes."""
    folder = tmp_path_factory.mktemp("ran")
    train = {"steps": 400, "batch_size": 4, "evaluate_every": 50}
    resources = {"workers": 2, "cpus_per_worker": 1, "trials_per_worker": 1}
    job = write_job(
        folder, train=train, search__trials=4, search__scheduler="fifo", resources=resources
    )
    orchestrator = Orchestrator(cluster, folder)
    line = ("submit", job, "--home", orchestrator.home, "--label", "project=toys", "--json")
    first = orchestrator(*line, "--no-wait")
    assert first.code == 0, first.err
    return Ran(job, orchestrator, first, orchestrator(*line))


@pytest.fixture
def orchestrator(cluster: RayProcesses, tmp_path: Path) -> Orchestrator:
    return Orchestrator(cluster, tmp_path)


def heard(process: subprocess.Popen[str], wanted: Callable[[str], bool]) -> str:
    """Return a process's standard error up to the wanted line."""
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if wanted(line):
            break
    assert said and wanted(said[-1]), "".join(said)
    return "".join(said)


def following(orchestrator: Orchestrator, job: str, text: str) -> subprocess.Popen[str]:
    """Start ``logs --follow`` and wait until it shows the text."""
    process = orchestrator.start("logs", job, "--follow")
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return process
    raise AssertionError("".join(said))


def heed_interrupts() -> None:
    """Restore Python's SIGINT handling, as in a terminal.

    Background jobs of a shell script ignore SIGINT and pass this on to their children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_a_job_submitted_twice_runs_once(ran: Ran) -> None:
    """A job submitted twice runs once, on both nodes, with its data and model packed.

    The second submission attaches, follows and ends with the outcome. ``jobs`` and ``logs`` show
    the same afterwards.
    """
    orchestrator, first, second = ran.orchestrator, ran.first, ran.second
    name = first.document["id"]
    assert first.document["status"] == "submitted" and name.startswith("tiny-")
    assert second.code == 0, second.err
    document = second.document
    assert (document["id"], document["attached"], document["status"]) == (name, True, "succeeded")
    result = document["result"]
    assert (result["status"], result["search"], len(result["trials"])) == ("succeeded", name, 4)
    assert len({worker["node"] for worker in result["workers"].values()}) == 2
    assert f"job {name} is under way already" in second.err and " step 50/400 " in second.err
    assert MARK not in second.err

    (listed,) = [one for one in orchestrator("jobs", "--json").document if one["id"] == name]
    assert (listed["status"], listed["exit_code"], listed["search"]) == ("succeeded", 0, name)
    assert listed["labels"] == {"project": "toys"} and listed["user"]
    assert name in orchestrator("jobs").out
    log = orchestrator("logs", name)
    assert log.code == 0 and " step 50/400 " in log.out and MARK not in log.out
    again = orchestrator("logs", name, "--follow", "--json")
    assert again.code == 0 and again.document["result"] == result
    assert any(" step 50/400 " in said for said in again.document["log"])
    stopped = orchestrator("stop", name)
    assert stopped.code == 0 and f"job {name} has succeeded" in stopped.out

    parents = [run for run in orchestrator.runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.data.tags["orchestrator.label.project"] for run in parents] == ["toys"]
    client = mlflow.MlflowClient(f"sqlite:///{orchestrator.home}/mlflow.db")
    assert [model.name for model in client.search_registered_models()] == ["tiny"]


def test_a_wrong_token_and_an_unknown_job_are_refused(
    orchestrator: Orchestrator, tmp_path: Path
) -> None:
    """A wrong token, and a job that the cluster does not know, give exit code 2 and a next step."""
    job = write_job(tmp_path)
    wrong = orchestrator("submit", job, RAY_AUTH_TOKEN="0" * 64, RAY_AUTH_TOKEN_PATH="")
    assert wrong.code == 2 and "refuses the token" in wrong.err and "RAY_AUTH_TOKEN" in wrong.err
    assert "0" * 64 not in wrong.err
    none = orchestrator("jobs", RAY_AUTH_MODE="disabled")
    assert none.code == 2 and "asks for a token" in none.err
    for verb in (("logs", "no-such"), ("logs", "no-such", "--follow"), ("stop", "no-such")):
        unknown = orchestrator(*verb)
        assert unknown.code == 2 and "knows no job 'no-such'" in unknown.err


def test_a_stopped_job_is_closed_and_goes_on(orchestrator: Orchestrator, tmp_path: Path) -> None:
    """stop waits until the MLflow runs are KILLED; a follower then exits with 130.

    The same submit goes on with the search, and Ctrl-C leaves that running.
    """
    job = write_job(
        tmp_path, **HOURS, resources={"workers": 1, "cpus_per_worker": 1, "trials_per_worker": 2}
    )
    line = ("submit", job, "--home", orchestrator.home)
    name = orchestrator(*line, "--no-wait").out.strip()
    follower = following(orchestrator, name, " step 20/")
    stopped = orchestrator("stop", name, "--json")
    assert stopped.document == {"id": name, "stopped": True, "status": "stopped"}
    out, err = follower.communicate(timeout=LIMIT_S)
    assert follower.returncode == 130 and f"job {name} was stopped" in err
    assert (
        f"next: orchestrator resume {name}" in out
    )  # the driver wrote this itself, so it was not killed
    assert {run.info.status for run in orchestrator.runs} == {"KILLED"}

    submitter = orchestrator.start(*line)
    said = heard(submitter, lambda text: "going on with search" in text)
    assert f"job {name}-2 is submitted" in said and f"going on with search {name}:" in said
    os.killpg(submitter.pid, signal.SIGINT)
    _, err = submitter.communicate(timeout=LIMIT_S)
    assert submitter.returncode == 130
    assert f"left job {name}-2 running\n  next: orchestrator logs {name}-2 --follow" in err
    status = {one["id"]: one["status"] for one in orchestrator("jobs", "--json").document}
    assert status[f"{name}-2"] == "running"
    assert orchestrator("stop", f"{name}-2").code == 0


def test_what_the_image_lacks_is_named(orchestrator: Orchestrator, tmp_path: Path) -> None:
    """A package missing on the cluster gives exit code 1, its name and a remedy."""
    shadow = tmp_path / "shadow" / "safetensors"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'safetensors'\")\n"
    )
    job = write_job(tmp_path)
    said = orchestrator(
        "submit", job, "--home", orchestrator.home, "--env", f"PYTHONPATH={shadow.parent}"
    )
    assert said.code == 1
    assert "lacks the Python package safetensors" in said.err and "--pip FILE" in said.err


def test_bad_data_is_the_jobs_own_error(orchestrator: Orchestrator, tmp_path: Path) -> None:
    """Data that only the driver can check is refused there.

    The submitter exits with the driver's code and message.
    """
    said = orchestrator(
        "submit",
        write_job(tmp_path),
        "--home",
        orchestrator.home,
        "--set",
        "data.target=nothing",
        "--json",
    )
    assert said.code == 2
    assert "data.target names column 'nothing'" in said.document["error"]["message"]


def test_what_was_tuned_is_served_there(cluster: RayProcesses, ran: Ran, tmp_path: Path) -> None:
    """``serve deploy`` serves the job's prompt on the same cluster, with its token."""
    (port,) = free_ports(1)
    settings = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "serve.yaml").read_text())
    settings["http_options"]["port"] = port
    (application,) = settings["applications"]
    application["args"]["max_replicas"] = 1
    application["runtime_env"]["env_vars"]["MLFLOW_TRACKING_URI"] = (
        f"sqlite:///{ran.orchestrator.home}/mlflow.db"
    )
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(settings))
    refused = cluster.run(
        ["serve", "deploy", str(file), "--address", cluster.url],
        check=False,
        RAY_AUTH_MODE="disabled",
    )
    assert refused.returncode != 0
    cluster.run(["serve", "deploy", str(file), "--address", cluster.url])
    try:
        ready = ["serve", "status", "--address", cluster.url, "--name", "orchestrator"]
        deadline = time.monotonic() + LIMIT_S
        while "status: RUNNING" not in (said := cluster.run(ready, check=False).stdout):
            assert time.monotonic() < deadline and "DEPLOY_FAILED" not in said, said
            time.sleep(1.0)
        query = [
            sys.executable,
            "-m",
            "orchestrator",
            "query",
            "tiny",
            "the quick brown fox",
            "--json",
        ]
        answered = cluster.run([*query, "--url", f"http://127.0.0.1:{port}"])
    finally:
        cluster.run(["serve", "shutdown", "--address", cluster.url, "--yes"])
    (answer,) = json.loads(answered.stdout)["data"]
    assert answer["label"] in (0, 1)
    assert sum(answer["probs"].values()) == pytest.approx(1.0)


@pytest.mark.failure
@pytest.mark.timeout(900)
def test_a_search_outlives_its_head(cluster: RayProcesses, ran: Ran, tmp_path: Path) -> None:
    """A search goes on after all nodes died and a new cluster took their place.

    The submitter submits again; the search goes on from its folder and ends as an undisturbed one.
    """
    submitter = Orchestrator(cluster, tmp_path).start(
        "submit", ran.job, "--home", tmp_path / "home", "--retries", "1", "--json"
    )
    said = heard(submitter, lambda text: " step 200/" in text)
    for node in (1, 0):
        cluster.kill_node(node)
    cluster.start()
    out, err = submitter.communicate(timeout=2 * LIMIT_S)
    assert submitter.returncode == 0, said + err
    assert "was lost; submitting it again" in err and "going on with search" in err
    document, expected = json.loads(out)["result"], ran.second.document["result"]
    assert close(trials(document), trials(expected))
    assert close(document["best"], expected["best"])


def trials(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**trial, "workers": None} for trial in document["trials"]]
