"""Attempts, logs and outcomes without a cluster, and servers that answer unexpectedly."""

from __future__ import annotations

import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from small_jobs import Command, write_job

from orchestrator.cluster.submit.follow import Forgotten, Lines, follow
from orchestrator.cluster.submit.job_server import Cluster, Job
from orchestrator.cluster.submit.outcome import failure, is_lost, result_in, result_line, visible
from orchestrator.cluster.submit.submit import Attempt, next_attempt
from orchestrator.errors import BadInput, Interrupted, JobFailed, Unreachable

JOBS = Path(__file__).parents[2] / "jobs"
BASE = "tiny-0123456789ab"


def job(name: str = BASE, status: str = "running", code: int | None = None, **changes: Any) -> Job:
    known = {"error_type": "", "message": "", "metadata": {}, "started": 1.0, "ended": None}
    return Job(**{"id": name, "status": status, "exit_code": code, **known, **changes})


def attempt(*jobs: Job, search: str | None = None) -> tuple[bool, Attempt]:
    return next_attempt(BASE, jobs, search)


def test_an_attempt_under_way_is_found() -> None:
    """The running attempt with the highest number is found; similar ids are ignored."""
    others = [job(f"{BASE}-x"), job(f"{BASE}0"), job(f"{BASE}-1"), job(f"other-{BASE}")]
    assert attempt(*others) == (False, Attempt(BASE, BASE, False))
    ended = [
        job(BASE, "failed", 1),
        *(job(f"{BASE}-{number}", "failed", 1) for number in range(2, 11)),
    ]
    running = job(f"{BASE}-11", metadata={"search": "s"})
    assert attempt(running, *ended) == (True, Attempt(f"{BASE}-11", "s", True))
    assert attempt(*ended)[1].id == f"{BASE}-11"


def test_an_attempt_goes_on_with_the_search_of_one_that_failed() -> None:
    """An attempt after a failure or a stop goes on with its search.

    After a success a new search begins.
    """
    for status in ("failed", "stopped"):
        over = job(f"{BASE}-2", status, metadata={"search": BASE})
        assert attempt(over) == (False, Attempt(f"{BASE}-3", BASE, False))
    assert attempt(job(BASE, "succeeded", 0)) == (False, Attempt(f"{BASE}-2", f"{BASE}-2", False))
    assert attempt(search=f"{BASE}-2") == (
        False,
        Attempt(BASE, f"{BASE}-2", False),
    )  # a new cluster knows no attempts


def test_each_line_of_a_log_is_shown_once() -> None:
    """Each line is shown once, however it is split.

    This holds when the log is read again from its beginning after a lost connection.
    """
    log = "first\nsecond line\n\n" + result_line({"a": 1}) + "\nlast"
    for size in (1, 3, 1000):
        for broken in range(0, len(log), 7):
            shown: list[str] = []
            lines = Lines(shown.append)
            for text in (log[:broken], log):
                lines.from_the_start()
                for start in range(0, len(text), size):
                    lines.add(text[start : start + size])
            lines.end()
            assert shown == ["first", "second line", "", "last"]


def test_the_result_is_the_logs_last_whole_document() -> None:
    """Lines that only look like a result, or were cut off, are ignored."""
    log = "\n".join(
        [result_line({"n": 1}), "text", result_line({"n": 2}), result_line({"n": 3})[:-4]]
    )
    assert result_in(log) == {"n": 2}
    assert result_in("nothing") == {} and not visible(result_line({})) and visible("text")


@pytest.mark.parametrize(
    ("code", "kind", "exit_code"),
    [
        (1, JobFailed, 1),
        (2, BadInput, 2),
        (3, Unreachable, 3),
        (130, Interrupted, 130),
        (55, JobFailed, 1),
    ],
)
def test_a_jobs_exit_code_is_passed_through(
    code: int, kind: type[Exception], exit_code: int
) -> None:
    """The error has the driver's own exit code, message and next step."""
    said = result_line(
        {"error": {"message": "what it was", "next": "what helps", "exit_code": code}}
    )
    error = failure(job(status="failed", code=code), said)
    assert type(error) is kind and error.exit_code == exit_code
    assert (error.message, error.hint) == (f"job {BASE} failed: what it was", "what helps")


def test_a_stopped_job_is_an_interrupt() -> None:
    """A stopped job gives exit code 130."""
    assert failure(job(status="stopped"), "").exit_code == 130


def test_a_killed_driver_is_lost_and_an_error_is_not() -> None:
    """A driver is lost when a signal ended it or when Ray lost its supervisor.

    Only such a job may be submitted again.
    """
    lost = [job(status="failed", code=code) for code in (-9, 137, 143)]
    lost += [job(status="failed", error_type="JOB_SUPERVISOR_ACTOR_DIED")]
    assert all(is_lost(one) for one in lost)
    assert all("was lost" in failure(one, "").message for one in lost)
    assert not is_lost(job(status="failed", code=1)) and not is_lost(job(status="stopped"))
    assert not is_lost(job(status="failed", error_type="RUNTIME_ENV_SETUP_FAILURE"))


@pytest.mark.parametrize(
    ("over", "log", "message", "hint"),
    [
        (
            job(status="failed", code=1),
            "ModuleNotFoundError: No module named 'optuna.samplers'\n", "optuna", "--pip",
        ),
        (
            job(status="failed", code=1),
            "python: No module named orchestrator\n", "orchestrator", "--image-has-code",
        ),
        (
            job(status="failed", code=127),
            "/bin/sh: 1: python: not found\n", "no `python` to run", "PATH",
        ),
        (
            job(
                status="failed",
                error_type="RUNTIME_ENV_SETUP_FAILURE",
                message="pip:\nNo matching distribution\n",
            ),
            "", "No matching distribution", "leave --pip out",
        ),
        (
            job(status="failed", error_type="JOB_SUPERVISOR_ACTOR_UNSCHEDULABLE"),
            "", "no node has room", "num-cpus",
        ),
        (
            job(status="failed", code=1),
            "something\nlast words\n", "last words", "orchestrator logs",
        ),
    ],
)  # fmt: skip
def test_failures_before_our_own_words(over: Job, log: str, message: str, hint: str) -> None:
    """A driver that failed before its own error message is explained, with a remedy."""
    error = failure(over, log)
    assert type(error) is JobFailed and message in error.message and hint in error.hint


# Servers that answer unexpectedly


class Answers:
    """A local server with canned answers, in place of other versions of Ray."""

    def __init__(self) -> None:
        self.routes: dict[str, tuple[int, Any]] = {}
        self.asked: list[str] = []
        self.bodies: dict[str, bytes] = {}
        told = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                told.asked.append(f"{self.command} {self.path}")
                if length := int(self.headers.get("Content-Length") or 0):
                    told.bodies[f"{self.command} {self.path}"] = self.rfile.read(length)
                known = told.routes.get(f"{self.command} {self.path}") or told.routes.get(self.path)
                status, body = known or (200 if self.command == "PUT" else 404, "no such job")
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_POST = do_PUT = do_GET

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def version(self, found: str) -> None:
        self.routes["/api/version"] = (
            200,
            {"version": "4", "ray_version": found, "ray_commit": "x"},
        )

    def job(self, name: str, **fields: Any) -> None:
        self.routes[f"/api/jobs/{name}"] = (200, listed(name, **fields))


@pytest.fixture
def answers() -> Iterator[Answers]:
    made = Answers()
    made.version(ray.__version__)
    yield made
    made.server.shutdown()
    made.server.server_close()


def test_a_cluster_of_an_older_ray_is_refused(answers: Answers, command: Command) -> None:
    """An older Ray is refused before anything is sent; the message has its version."""
    answers.version("2.9.3")
    said = command("submit", JOBS / "quickstart.yaml", "--address", answers.url)
    assert said.code == 2 and "runs Ray 2.9.3" in said.err and "newer image" in said.err
    assert {line.split()[0] for line in answers.asked} == {"GET"}


def test_a_cluster_of_a_newer_ray_is_noted(answers: Answers) -> None:
    """A newer Ray gives a note with both versions; the job runs with the cluster's Ray."""
    answers.version("2.99.0")
    (note,) = Cluster(answers.url).connect()
    assert "2.99.0" in note and ray.__version__ in note
    answers.version(ray.__version__)
    assert Cluster(answers.url).connect() == []


def test_what_is_sent(answers: Answers, command: Command, tmp_path: Path) -> None:
    """The packages have the spec, its files and this code, and are named by content.

    The job has no path of this machine.
    """
    answers.routes["GET /api/jobs/"] = (200, [])
    answers.routes["POST /api/jobs/"] = (200, {"job_id": BASE, "submission_id": BASE})
    pip = tmp_path / "more.txt"
    pip.write_text("optuna==5.0.0\n")
    job = write_job(tmp_path, base_model__id="owner/model")
    options = (
        "--no-wait",
        "--env",
        "HF_TOKEN=t",
        "--pip",
        pip,
        "--label",
        "project=p",
        "--home",
        "/mnt/searches",
    )
    said = command("submit", job, "--address", answers.url, *options)
    assert said.code == 0, said.err
    name = said.out.strip()
    assert f"orchestrator stop {name}" in said.err
    sent = json.loads(answers.bodies["POST /api/jobs/"])
    assert (sent["submission_id"], sent["entrypoint"]) == (
        name,
        "python -m orchestrator on-cluster",
    )
    assert (
        sent["metadata"] | {"label.project": "p", "search": name, "name": "tiny"}
        == sent["metadata"]
    )
    environment = sent["runtime_env"]
    assert (
        environment["env_vars"] | {"HF_TOKEN": "t", "ORCHESTRATOR_HOME": "/mnt/searches"}
        == environment["env_vars"]
    )
    assert environment["pip"]["packages"] == ["optuna==5.0.0"]
    assert str(tmp_path) not in json.dumps(sent)
    uploaded = {
        path.rpartition("/")[2]: body
        for path, body in answers.bodies.items()
        if path.startswith("PUT")
    }
    packages = [
        zipfile.ZipFile(io.BytesIO(uploaded[uri.removeprefix("gcs://")])).namelist()
        for uri in (environment["working_dir"], *environment["py_modules"])
    ]
    assert {"job.yaml", "inputs/data-path-train.jsonl"} <= set(packages[0])
    assert {"orchestrator/__main__.py", "orchestrator/cluster/submit/submit.py"} <= set(packages[1])

    answers.asked.clear()
    answers.routes["GET /api/jobs/"] = (200, [listed(name, "RUNNING")])
    again = command("submit", job, "--address", answers.url, *options, "--json")
    assert again.document["status"] == "attached" and again.document["id"] == name
    assert {line.split()[0] for line in answers.asked} == {"GET"}


def listed(name: str, status: str, **fields: Any) -> dict[str, Any]:
    known = {
        "type": "SUBMISSION",
        "submission_id": name,
        "entrypoint": "e",
        "start_time": 1000,
        "status": status,
    }
    return known | fields


def test_an_address_given_wins_over_the_environment(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A given address has precedence over RAY_ADDRESS, which Ray's client would use."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:9")
    Cluster(answers.url).connect()
    assert "GET /api/version" in answers.asked


def refused(status: int) -> Callable[[Answers], None]:
    return lambda answers: answers.routes.update({"/api/version": (status, "Unauthorized")})


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (refused(401), BadInput, "asks for a token"),
        (refused(403), BadInput, "refuses the token"),
        (refused(502), Unreachable, "no Ray cluster answers"),
        (refused(404), Unreachable, "no Ray cluster answers"),
        (
            lambda answers: answers.routes.update({"/api/version": (200, "<html>")}),
            Unreachable,
            "no Ray cluster",
        ),
    ],
)
def test_what_answers_otherwise_is_told_apart(
    answers: Answers, change: Callable[[Answers], None], kind: type[Exception], message: str
) -> None:
    """A missing or wrong token is BadInput; any other answer is no Ray cluster."""
    change(answers)
    with pytest.raises(kind, match=message):
        Cluster(answers.url).connect()


def test_a_cluster_that_is_away(command: Command) -> None:
    """An unreachable cluster gives exit code 3, the next step and one JSON document."""
    said = command("jobs", "--address", "http://127.0.0.1:9", "--json")
    assert said.code == 3 and "no Ray cluster answers" in said.document["error"]["message"]
    assert "kubectl port-forward" in said.err


def test_jobs_are_listed_for_people_and_programs(answers: Answers, command: Command) -> None:
    """Both lists have names, users and labels, and nothing of the environment."""
    metadata = {"name": "tiny", "search": BASE, "user": "ada", "label.project": "p"}
    secret = {"env_vars": {"HF_TOKEN": "hf_verysecret"}}
    fields = {"end_time": 61000, "metadata": metadata, "driver_exit_code": 0, "runtime_env": secret}
    one = listed(BASE, "SUCCEEDED", **fields)
    answers.routes["/api/jobs/"] = (
        200,
        [one, {"type": "DRIVER", "job_id": "01", "entrypoint": "e", "status": "RUNNING"}],
    )
    said = command("jobs", "--address", answers.url)
    assert (
        "1 min 0 s" in said.out
        and "ada" in said.out
        and "project=p" in said.out
        and "verysecret" not in said.out
    )
    (shown,) = command("jobs", "--address", answers.url, "--json").document
    assert (shown["id"], shown["status"], shown["labels"], shown["seconds"]) == (
        BASE,
        "succeeded",
        {"project": "p"},
        60,
    )
    assert shown["submitted"] == "1970-01-01T00:00:01+00:00"
    answers.routes["/api/jobs/"] = (200, [])
    assert "no job was submitted" in command("jobs", "--address", answers.url).out


def test_a_cluster_that_was_started_anew_has_forgotten_its_jobs(answers: Answers) -> None:
    """Following a job that a new cluster does not know ends at once."""
    with pytest.raises(Forgotten, match=f"knows no job {BASE}"):
        follow(Cluster(answers.url), BASE, print, patience_s=60.0)


def test_a_job_that_is_over_is_not_waited_for(answers: Answers) -> None:
    """A job that has ended is not waited for, even if its log is unreachable."""
    answers.job(BASE, status="FAILED", driver_exit_code=137)
    found = follow(Cluster(answers.url), BASE, print, patience_s=60.0)
    assert is_lost(found) and Cluster(answers.url).log(BASE) == ""
