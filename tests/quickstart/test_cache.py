"""The cache: each model is made once, completely or not at all. Models here are tiny."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.models.builtin import Recipe, cache_folder, quickstart_model

TINY = Recipe(
    documents=64, hidden_size=16, layers=1, heads=2, key_value_heads=1, intermediate_size=16
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ORCHESTRATOR_CACHE goes before XDG_CACHE_HOME, and that before the home folder's .cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ORCHESTRATOR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "prompt-orchestrator"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "prompt-orchestrator"
    monkeypatch.setenv("ORCHESTRATOR_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_made_once(cache: Path) -> None:
    """A second call trains nothing and returns the same folder."""
    steps: list[tuple[int, int]] = []
    folder = quickstart_model(lambda done, total: steps.append((done, total)), TINY)
    assert steps == [(step, 4) for step in range(1, 5)]
    assert quickstart_model(lambda *_: pytest.fail("trained again"), TINY) == folder
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert wanted <= {path.name for path in folder.iterdir()} and folder.parent == cache


def test_an_interrupted_making_leaves_nothing(cache: Path) -> None:
    """An interrupted training leaves no files and no incomplete model."""

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quickstart_model(interrupt, TINY)
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert quickstart_model(lambda *_: None, TINY).is_dir()


def test_what_a_killed_process_left_is_removed(cache: Path) -> None:
    """Making a model removes the incomplete folders of that model, and of no other."""
    own = cache / f".quickstart-{TINY.digest}-8a_1c0de"
    other = cache / ".quickstart-of-another-recipe"
    for folder in (own, other):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    quickstart_model(lambda *_: None, TINY)
    assert not own.exists() and other.exists()


def test_two_processes_at_once_make_one(cache: Path) -> None:
    """One process trains and the other waits; both get the same folder.

    No library prints progress bars.
    """
    code = (
        "from orchestrator.models.builtin import Recipe, quickstart_model; steps = []; "
        f"print(quickstart_model(lambda *step: steps.append(step), {TINY!r}), len(steps))"
    )
    environment = {**os.environ, "ORCHESTRATOR_CACHE": str(cache)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for _ in range(2)
    ]
    answers = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [errors for _, errors in answers] == ["", ""]
    said = [output.split() for output, _ in answers]
    assert said[0][0] == said[1][0] and sorted(int(steps) for _, steps in said) == [0, 4]
