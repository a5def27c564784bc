"""The request: its id, what it shows, and which of this machine's variables it has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from small_jobs import Command, write_job

from orchestrator.cluster.submit import Submission, make_submission
from orchestrator.cluster.submit.environment import forwarded
from orchestrator.cluster.submit.job_server import OLDEST_RAY, checked_address, token
from orchestrator.cluster.submit.request import ENTRYPOINT, parse_labels, read_pip
from orchestrator.errors import BadInput
from orchestrator.job.yaml import load_job
from orchestrator.utils.text import mask_secrets

SECRET = "hf_verysecret"


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "HF_TOKEN",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_AUTH_MODE",
    ):
        monkeypatch.delenv(name, raising=False)


def made(folder: Path, overrides: tuple[str, ...] = (), **options: Any) -> Submission:
    folder.mkdir(exist_ok=True)
    return make_submission(
        load_job(write_job(folder, base_model__id="owner/model"), overrides), None, **options
    )


def test_equal_submissions_have_equal_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The id does not depend on the files' place, labels, retries or a secret's value."""
    monkeypatch.setenv("HF_TOKEN", SECRET)
    first = made(tmp_path / "one", asked=["HF_TOKEN"], labels=["project=a"]).request.base_id
    monkeypatch.setenv("HF_TOKEN", "another")
    assert (
        made(tmp_path / "two", asked=["HF_TOKEN"], labels=["project=b"], retries=3).request.base_id
        == first
    )
    assert re.fullmatch(r"tiny-[0-9a-f]{12}", first)


def test_whatever_changes_the_result_changes_the_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The id depends on spec, data, code, packages, home and the MLflow server."""
    pip = tmp_path / "requirements.txt"
    pip.write_text("optuna==5.0.0  # for the searcher\n\n# nothing\n")
    ids = [
        made(tmp_path / "job"),
        made(tmp_path / "job", ("train.steps=17",)),
        made(tmp_path / "job", pip=pip),
        made(tmp_path / "job", home="/mnt/searches"),
        made(tmp_path / "job", image_has_code=True),
        made(tmp_path / "job", asked=["A=1"]),
    ]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    ids.append(made(tmp_path / "job"))
    job = load_job(write_job(tmp_path / "job", base_model__id="owner/model"))
    with (tmp_path / "job" / "train.jsonl").open("a") as stream:
        stream.write('{"text": "one more", "label": 0}\n')
    ids.append(make_submission(job, None))
    found = [one.request.base_id for one in ids]
    assert len(set(found)) == len(found)


def test_nothing_that_anybody_wrote_is_run_by_a_shell(tmp_path: Path) -> None:
    """The entrypoint, which Ray runs in a shell, is the same for every job."""
    label = "note=$(reboot); `id`"
    request = made(tmp_path, ('data.template="{text} $(reboot)"',), labels=[label]).request
    assert (
        request.document("http://h:1")["entrypoint"]
        == ENTRYPOINT
        == "python -m orchestrator on-cluster"
    )
    environment = request.runtime_env("s", tmp_path / "job", tmp_path / "code" / "orchestrator")
    assert (
        "reboot" not in environment["working_dir"]
        and request.metadata("s")["label.note"] == label[5:]
    )


def test_secrets_stay_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Command
) -> None:
    """Tokens and passwords are sent only when named, and are never shown.

    Settings of MLflow and of the hub are sent by themselves.
    """
    for name, value in {
        "HF_TOKEN": SECRET, "HF_HUB_OFFLINE": "0", "HF_HOME": "/home/me/hf",
        "MLFLOW_TRACKING_PASSWORD": SECRET, "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "RAY_AUTH_TOKEN": SECRET, "OTHER": "x",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    job = write_job(tmp_path, base_model__id="owner/model")
    line = ("submit", job, "--dry-run", "--address", f"http://me:{SECRET}@head:8265")
    plain = command(*line, "--json").document
    variables = plain["runtime_env"]["env_vars"]
    assert {
        "MLFLOW_TRACKING_URI": "http://mlflow:5000",
        "HF_HUB_OFFLINE": "0",
    }.items() <= variables.items()
    assert not {"HF_TOKEN", "HF_HOME", "MLFLOW_TRACKING_PASSWORD", "RAY_AUTH_TOKEN", "OTHER"} & set(
        variables
    )
    assert any("HF_TOKEN, MLFLOW_TRACKING_PASSWORD stays here" in note for note in plain["notes"])
    assert plain["address"] == "http://***@head:8265"
    asked = ("--env", "HF_TOKEN", "--env", "HF_HOME=/mnt/hf", "--env", f"MINE={SECRET}")
    for said in (command(*line, "--json", *asked), command(*line, *asked)):
        assert said.code == 0 and SECRET not in said.out + said.err and "/mnt/hf" not in said.out
        assert "HF_TOKEN" in said.out and "***" in said.out
    sent = made(tmp_path / "sent", asked=["HF_TOKEN"]).request.runtime_env("s", tmp_path, tmp_path)
    assert sent["env_vars"]["HF_TOKEN"] == SECRET


def test_a_dry_run_asks_nobody_and_shows_the_request(command: Command, tmp_path: Path) -> None:
    """A dry run contacts no cluster; its document has every part of the request."""
    job = write_job(tmp_path, base_model__id="/mnt/model")
    line = ("submit", job, "--dry-run", "--address", "http://127.0.0.1:9", "--label", "project=p/1")
    document = command(*line, "--json").document
    assert document["submission_id"].startswith("tiny-") and document["entrypoint_num_cpus"] == 0
    assert document["metadata"]["label.project"] == "p/1" and document["metadata"]["user"]
    assert document["metadata"]["search"] == document["submission_id"]
    packed = [file["name"] for file in document["runtime_env"]["working_dir"]]
    assert packed == [
        f"inputs/data-path-{split}.jsonl" for split in ("train", "validation", "test")
    ]
    assert document["on_the_cluster"] == ["/mnt/model"] and document["job"]["name"] == "tiny"
    assert document["runtime_env"]["pip"] is None
    page = command(*line)
    assert (
        page.code == 0
        and page.out.endswith("nothing was sent\n")
        and document["submission_id"] in page.out
    )
    assert command(*line, "--json").document == document


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"asked": ["NOT SET"]}, "not the name of a variable"),
        ({"asked": ["SURELY_NOT_SET_HERE"]}, "is not set on this machine"),
        ({"asked": ["RAY_ADDRESS=x"]}, "can't be set by a job"),
        ({"labels": ["project"]}, "is not NAME=VALUE"),
        ({"labels": ["user=somebody"]}, "is set already"),
        ({"labels": ["a=line\nbreak"]}, "plain characters"),
        ({"home": "relative"}, "is not an absolute path"),
        (
            {"home": "ftp://host/searches"},
            "--home is 'ftp://host/searches': no store of kind 'ftp'",
        ),
        ({"home": "s3://me:secret@bucket/searches"}, "--home holds a key"),
        ({"home": "s3://"}, "names no bucket"),
        ({"shared": [Path("/no/such/folder")]}, "is not a folder on this machine"),
        ({"pip": Path("/no/such/file")}, "--pip /no/such/file"),
    ],
)
def test_bad_options_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Bad options raise BadInput before the cluster is contacted."""
    with pytest.raises(BadInput, match=re.escape(message)):
        made(tmp_path, **options)


def test_searches_may_be_kept_in_a_store(tmp_path: Path) -> None:
    assert made(tmp_path, home="s3://bucket/searches").request.home == "s3://bucket/searches"


def test_an_address_with_a_login_is_not_passed_on_by_itself() -> None:
    """An address with a login is sent only when named, since the cluster lists it."""
    here = {"MLFLOW_TRACKING_URI": f"https://me:{SECRET}@mlflow"}
    with pytest.raises(BadInput, match="MLFLOW_TRACKING_URI holds a login") as refused:
        forwarded(here)
    assert SECRET not in str(refused.value)
    assert forwarded(here, ["MLFLOW_TRACKING_URI"]).shown() == {"MLFLOW_TRACKING_URI": "***"}
    assert (
        mask_secrets(f"--index-url https://me:{SECRET}@index/simple x")
        == "--index-url https://***@index/simple x"
    )


def test_what_was_probably_not_meant_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Notes warn of likely mistakes.

    These are retries without a home that outlives the cluster, and a local MLflow address with a
    remote cluster.
    """
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    job = load_job(write_job(tmp_path, base_model__id="owner/model"))
    here = make_submission(job, "http://127.0.0.1:8265", home="/mnt/searches", retries=2).document()
    assert here["notes"] == []
    lost, elsewhere = make_submission(job, "http://head:8265", retries=2).document()["notes"]
    assert (
        "without --home" in lost
        and "MLFLOW_TRACKING_URI=http://localhost:5000 means the node" in elsewhere
    )


def test_pip_lines_and_labels(tmp_path: Path) -> None:
    """Comments are removed from pip lines; a hash within a word stays."""
    file = tmp_path / "constraints.txt"
    file.write_text("# pinned\nabc==1.0\n\nx @ https://h/x.whl#sha256=1 # why\n")
    assert read_pip(file) == ("abc==1.0", "x @ https://h/x.whl#sha256=1")
    assert parse_labels(["project=a=b", "team="]) == {"project": "a=b", "team": ""}


@pytest.mark.parametrize(
    ("address", "hint"),
    [
        ("ray://head:10001", "http://head:8265"),
        ("head:6379", "http://head:8265"),
        ("auto", "http://HOST:8265"),
        ("http://head:port", "http://"),
        ("", "http://HOST:8265"),
    ],
)
def test_other_addresses_are_refused_with_the_right_one(address: str, hint: str) -> None:
    """Jobs go to the dashboard's address; the hint for another address says so."""
    with pytest.raises(BadInput, match="not the address of a dashboard") as refused:
        checked_address(address)
    assert hint in refused.value.hint
    assert checked_address("https://head/") == "https://head"


def test_the_token_is_found_as_ray_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token comes from the variable, then from the file.

    This machine's own token is sent only in token mode, so that no other cluster gets it.
    """
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("own")
    (tmp_path / "file").write_text("filed\n")
    path = {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "file")}
    assert token({"RAY_AUTH_TOKEN": "given", **path}) == "given"
    assert token(path) == "filed"
    assert token({}) is None
    assert token({"RAY_AUTH_MODE": "token"}) == "own"
    assert token({"RAY_AUTH_MODE": "disabled", **path}) is None
    with pytest.raises(BadInput, match="RAY_AUTH_TOKEN_PATH"):
        token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


def test_the_oldest_ray_is_the_projects() -> None:
    """The oldest accepted Ray is the one that pyproject.toml requires."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (wanted,) = [line for line in project["dependencies"] if line.startswith("ray[")]
    assert wanted.endswith(">=" + ".".join(map(str, OLDEST_RAY)))
