"""The demo's time table; ``make demo`` runs the whole demo."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_jobs import Finished

from orchestrator.cli.demo import time_table


def test_the_time_table_adds_up(finished: Finished) -> None:
    """The table has at most eight lines, and its rows cover the demo's seconds exactly once."""
    seconds = finished.document["seconds"]
    head, *rows = time_table(finished.document, 20.0, seconds["total"] + 30.0)
    assert len(rows) <= 7
    assert head == f"where the demo's {seconds['total'] + 30:.0f} s went:"
    spent = {
        name: float(value)
        for name, value in (re.split(r"\s\s+", row.strip().removesuffix(" s")) for row in rows)
    }
    assert sum(spent.values()) == pytest.approx(seconds["total"] + 30, abs=0.05 * len(rows))
    assert spent["8 trials"] == pytest.approx(seconds["trials"], abs=0.051)
    assert spent["serving and asking"] == 20.0
    assert spent["starting and ending programs"] == pytest.approx(10.0, abs=0.2)


def test_the_module_takes_the_verbs_options(tmp_path: Path) -> None:
    """``python -m orchestrator.demo --help`` prints the verb's help and starts nothing."""
    argv = [sys.executable, "-m", "orchestrator.demo", "--help"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "Usage: orchestrator demo" in done.stdout
    assert list(tmp_path.iterdir()) == []
