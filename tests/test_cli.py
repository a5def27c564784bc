"""What the command line imports and prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_jobs import Command, write_job
from typer.main import get_command

from orchestrator.cli.entry import app
from orchestrator.cli.groups import GROUPS

HEAVY = ("torch", "ray", "transformers", "mlflow", "datasets", "numpy", "fastapi")
GENEROUS_S = 30.0


def imported(arguments: list[str]) -> tuple[set[str], float]:
    """Return the heavy libraries that a fresh command imported, and its seconds."""
    program = (
        "import json, sys\n"
        f"sys.argv = ['orchestrator', *{arguments!r}]\n"
        "from orchestrator.cli import run_verb\n"
        "code = run_verb()\n"
        "assert not code, code\n"
        f"print('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    return set(json.loads(done.stdout.splitlines()[-1])), time.monotonic() - started


def test_help_imports_nothing_heavy(record_property: pytest.RecordProperty) -> None:
    """``orchestrator --help`` answers at once: it loads no torch, Ray or other large library."""
    heavy, seconds = imported(["--help"])
    record_property("seconds", seconds)
    assert heavy == set()
    assert seconds < GENEROUS_S


def test_validate_imports_nothing_heavy(tmp_path: Path) -> None:
    """Checking a spec loads no large library; checking its files loads neither torch nor Ray."""
    job = str(write_job(tmp_path))
    heavy, _ = imported(["validate", job, "--spec-only"])
    assert heavy == set()
    heavy, seconds = imported(["validate", job])
    assert heavy & {"torch", "ray", "transformers", "mlflow", "fastapi"} == set()
    assert seconds < GENEROUS_S


def test_validate_as_json(command: Command, tmp_path: Path) -> None:
    """The document has the whole spec with its defaults, or every problem with its line."""
    job = write_job(tmp_path)
    said = command("validate", job, "--set", "search.trials=3", "--json")
    assert said.document["valid"] and said.document["spec"]["search"]["trials"] == 3
    assert said.document["spec"]["train"]["optimizer"] == "adamw"
    refused = command(
        "validate", job, "--set", "train.steps=0", "--set", "search.trials=x", "--json"
    )
    assert refused.code == 2
    assert {problem["where"] for problem in refused.document["error"]["problems"]} == {
        "train.steps",
        "search.trials",
    }


def test_overrides_are_repeated_in_the_next_step(command: Command, tmp_path: Path) -> None:
    """The shown next step includes the overrides and can be copied into a shell."""
    said = command("validate", write_job(tmp_path), "--set", 'data.template="{text} is it?"')
    assert said.out.splitlines()[-1].endswith(
        f"run {tmp_path}/job.yaml --set 'data.template=\"{{text}} is it?\"'"
    )


def test_version_and_help(command: Command) -> None:
    """The version is one line; help names every verb."""
    assert command("--version").out.startswith("orchestrator 0.")
    shown = command("--help").out
    verbs = {name: verb for name, verb in get_command(app).commands.items() if not verb.hidden}
    assert len(verbs) > 20
    for name, verb in verbs.items():
        assert f" {name} " in shown
        assert getattr(verb, "rich_help_panel", None) in GROUPS
    assert command().code in (0, 2)  # without a verb: the help
