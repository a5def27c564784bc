"""A registered version and an interrupted search of commit b67b99a can still be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from earlier_release import expected, unpacked

from orchestrator.serving.offline import OfflineModel


@pytest.fixture
def folder() -> Iterator[Path]:
    """Unpack the working directory of the earlier release."""
    with unpacked() as folder:
        yield folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in the folder, with its own cache."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "orchestrator", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_version_of_an_earlier_release_answers_as_before(folder: Path) -> None:
    """The registered version loads and gives its former labels and probabilities."""
    prompt = next(folder.glob("mlruns/finished/models/*/artifacts/artifacts/prompt"))
    known = expected(folder)["answers"]
    answers = OfflineModel.from_artifact(prompt).classify([{"text": row["text"]} for row in known])
    for answer, row in zip(answers, known, strict=True):
        assert answer["label"] == row["label"]
        assert answer["probs"] == pytest.approx(row["probs"], abs=1e-4)


def test_a_version_of_an_earlier_release_passes_the_gate(folder: Path) -> None:
    """``promote`` checks digests, shapes and the base model before it moves an alias."""
    moved = run(folder, "promote", "finished", "1", "--alias", "checked")
    assert moved.returncode == 0, moved.stderr
    shown = run(folder, "models", "finished@checked", "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["version"] == 1


def test_pyfunc_of_an_earlier_release_still_answers(folder: Path) -> None:
    """The version's own copy of the pyfunc file still finds the modules that it imports."""
    code = (
        "import mlflow, json\n"
        "mlflow.set_tracking_uri('sqlite:///mlflow.db')\n"
        "model = mlflow.pyfunc.load_model('models:/finished/1')\n"
        "print(json.dumps(list(model.predict([{'text': 'the quick brown fox'}]))))\n"
    )
    environment = {**os.environ, "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)[0]["label"] in (0, 1)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_search_of_an_earlier_release_goes_on(folder: Path) -> None:
    """``resume`` gives the same result as the release that began the search."""
    resumed = run(folder, "resume", "latest", "--json", "--quiet")
    assert resumed.returncode == 0, resumed.stderr
    document, known = json.loads(resumed.stdout), expected(folder)["resumed"]
    assert [(trial["id"], trial["status"], trial["steps"]) for trial in document["trials"]] == [
        (trial["id"], trial["status"], trial["steps"]) for trial in known["trials"]
    ]
    assert document["best"]["trial"] == known["best"]["trial"]
    loss = document["best"]["metrics"]["validation"]["loss"]
    assert loss == pytest.approx(known["best"]["metrics"]["validation"]["loss"], rel=1e-3)
    assert document["model"]["version"] == 1
