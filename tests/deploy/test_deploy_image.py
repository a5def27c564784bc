"""The images of deploy/image and deploy/mlflow: their contents and the user they run as.

No container engine is needed: the Dockerfiles are read, and the entry point runs here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.deploy.manifests import DEPLOY, ROOT, pinned, version

IMAGE = DEPLOY / "image"
FILES = (IMAGE / "Dockerfile", DEPLOY / "mlflow" / "Dockerfile")


def instructions(file: Path) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions with their arguments.

    Continued lines are joined, and comments are left out.
    """
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [
        (line.split()[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()
    ]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_an_image_runs_as_nobody_special(file: Path) -> None:
    """The last user is a number above 0, which Kubernetes can check.

    Nothing is copied or run after the last USER instruction.
    """
    names = [name for name, _ in instructions(file)]
    users = [argument for name, argument in instructions(file) if name == "USER"]
    assert all(int(part) > 0 for part in users[-1].split(":"))
    assert not {"RUN", "COPY", "ADD"} & set(names[len(names) - names[::-1].index("USER") :])
    assert "ADD" not in names and "sudo" not in file.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_an_image_starts_from_a_named_version(file: Path) -> None:
    """Each stage starts from a Python that the project supports, or from another stage."""
    variables = dict(
        argument.split("=", 1)
        for name, argument in instructions(file)
        if name == "ARG" and "=" in argument
    )
    stages = set()
    for _, argument in [it for it in instructions(file) if it[0] == "FROM"]:
        image = re.sub(r"\$\{(\w+)\}", lambda name: variables[name[1]], argument.split()[0])
        assert image in stages or re.fullmatch(r"python:3\.1[1-9]\S*", image), image
        stages |= set(argument.split()[2:])


def test_the_image_is_pinned_by_the_constraints() -> None:
    """Every pip install names constraints.txt, and the label has the project's version."""
    runs = " && ".join(argument for name, argument in instructions(FILES[0]) if name == "RUN")
    installs = re.findall(r"pip install [^&;]*", runs)
    assert len(installs) >= 3 and all(
        "--constraint constraints.txt" in install for install in installs
    )
    given = {
        argument.partition("=")[0] for name, argument in instructions(FILES[0]) if name == "ARG"
    }
    assert given == {"PYTHON_IMAGE", "ACCELERATOR", "TORCH_INDEX"}
    assert sum(name == "FROM" for name, _ in instructions(FILES[0])) == 2
    assert f"org.opencontainers.image.version={version()}" in FILES[0].read_text()


def test_mlflow_s_image_has_the_versions_of_the_constraints() -> None:
    """The server has the client's package versions, so that both know the same schema."""
    text = FILES[1].read_text()
    for package in ("mlflow", "psycopg", "Flask-WTF", "boto3"):
        (found,) = re.findall(rf"\b{package}(?:\[\w+\])?==([\w.]+)", text)
        assert found == pinned()[package]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.parent.name)
def test_what_is_copied_is_there_and_may_be(file: Path) -> None:
    """Every copied path exists, and the ignore file lets it into the build context."""
    context = ROOT if file.parent == IMAGE else file.parent
    ignored = file.with_name("Dockerfile.dockerignore")
    allowed = (
        [it[1:] for it in ignored.read_text().split("\n") if it.startswith("!")]
        if ignored.exists()
        else ["*"]
    )
    copied = set()
    for _, argument in [
        it for it in instructions(file) if it[0] == "COPY" and "--from" not in it[1]
    ]:
        copied |= {part for part in shlex.split(argument)[:-1] if not part.startswith("--")}
    for source in copied:
        assert (context / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in allowed), source
    if ignored.exists():
        assert copied == set(allowed) and ignored.read_text().splitlines()[1] == "*"


def entrypoint(
    *arguments: str | Path, home: Path, store: bool = False
) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    code = str(Path(__file__).parents[2])
    environment = os.environ | {
        "ORCHESTRATOR_HOME": home.as_uri() if store else str(home),
        "PATH": path,
    }
    environment |= {"PYTHONPATH": code, "ORCHESTRATOR_CACHE": str(home / "cache")}
    argv = [IMAGE / "run-or-resume", *arguments]
    return subprocess.run(
        argv, env=environment, cwd=home, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("store", [False, True])
def test_a_first_attempt_runs_the_job(tmp_path: Path, store: bool) -> None:
    """Without an earlier search, ``run`` gets the job and the options."""
    done = entrypoint("no-such-job.yaml", "--quiet", home=tmp_path, store=store)
    assert done.returncode == 2 and "no-such-job.yaml" in done.stderr


def test_an_attempt_that_can_not_look_begins_nothing(tmp_path: Path) -> None:
    """A store that does not answer may hold a search, so no new one begins."""
    (tmp_path / "searches").write_text("no folder")
    done = entrypoint("no-such-job.yaml", home=tmp_path, store=True)
    assert done.returncode != 0 and "no-such-job" not in done.stderr


@pytest.mark.parametrize("store", [False, True])
def test_a_later_attempt_goes_on_with_the_search(tmp_path: Path, store: bool) -> None:
    """A search of an earlier attempt is resumed, whatever the job file says by now."""
    begun = tmp_path / "searches" / "sms-spam-20260101-000000"
    begun.mkdir(parents=True)
    (begun / "search.json").write_text("{}")
    done = entrypoint("no-such-job.yaml", home=tmp_path, store=store)
    assert done.returncode == 2 and "going on with it" in done.stderr
    assert "sms-spam-20260101-000000" in done.stderr and "no-such-job" not in done.stderr


def test_an_attempt_without_a_job_says_how(tmp_path: Path) -> None:
    done = entrypoint(home=tmp_path)
    assert done.returncode == 2 and "usage: run-or-resume JOB" in done.stderr
