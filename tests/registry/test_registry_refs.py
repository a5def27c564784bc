"""References, addresses and alias decisions: everything that needs no store."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import BadInput
from orchestrator.registry import ModelRef, Registry, parse_ref, printable
from orchestrator.registry.aliases.moves import Kind, Move, former_holder, read_moves
from orchestrator.registry.runs.entries import (
    LogEntry,
    as_texts,
    coalesce,
    load_entries,
    run_label,
    save_entries,
)
from orchestrator.registry.store import normalised
from orchestrator.registry.versions.refs import suggestion
from orchestrator.utils.text import mask_secrets


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("spam", ModelRef("spam")),
        ("spam@champion", ModelRef("spam", alias="champion")),
        ("spam:3", ModelRef("spam", version=3)),
        ("models:/spam@champion", ModelRef("spam", alias="champion")),
        ("models:/spam/3", ModelRef("spam", version=3)),
        ("a@b@champion", ModelRef("a@b", alias="champion")),
        ("line\nbreak:2", ModelRef("line\nbreak", version=2)),
    ],
)
def test_every_way_to_write_a_reference(text: str, ref: ModelRef) -> None:
    """MLflow's forms and ours mean the same; the last separator counts."""
    assert parse_ref(text) == ref


@pytest.mark.parametrize(
    "text",
    ["", "spam@", "@champion", "spam:", "spam:0", "models:/spam", "models:/m-1f", "models:/"],
)
def test_a_bad_reference_names_the_forms(text: str) -> None:
    with pytest.raises(BadInput, match="name@alias"):
        parse_ref(text)


def test_what_is_printed_holds_no_control_characters() -> None:
    assert printable("a\nb\x1b[31m\u202ec") == "a\\nb\\x1b[31m\\u202ec"
    assert str(ModelRef("a\nb", alias="x")) == "a\\nb@x"


def test_nearest_name_first() -> None:
    assert suggestion("sms-spm", ["sms-spam", "boolq"]).startswith(
        "did you mean 'sms-spam'? known: boolq, sms-spam"
    )
    assert suggestion("zzz", []) == ""


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("./mlruns", "is a folder"),
        ("file:///tmp/mlruns", "is a folder"),
        ("gopher://x", "is not one of"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("http://host:port", "the port is not a number"),
    ],
)
def test_an_address_that_can_hold_no_registry_is_refused(uri: str, reason: str) -> None:
    """The address is refused before anything is opened, with a hint that names a good one."""
    with pytest.raises(BadInput, match=reason) as refusal:
        Registry(uri)
    assert refusal.value.hint


def test_sqlite_addresses_do_not_move_with_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Registry().tracking_uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert normalised("sqlite:///a.db?timeout=3") == f"sqlite:///{tmp_path}/a.db?timeout=3"


def test_the_environment_names_the_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000/")
    assert Registry().tracking_uri == "http://tracking:5000"
    assert pickle.loads(pickle.dumps(Registry("http://other:1"))).tracking_uri == "http://other:1"


@pytest.mark.parametrize(
    "uri", ["postgresql://me:s3cr@t@db/mlflow", "http://h/?password=s3cret&x=1"]
)
def test_passwords_are_mask_secrets(uri: str) -> None:
    assert "s3cr" not in mask_secrets(f"no answer from {uri}")
    assert mask_secrets("http://127.0.0.1:5000/a@b") == "http://127.0.0.1:5000/a@b"


def test_importing_the_registry_imports_no_heavy_module() -> None:
    """``orchestrator --help`` stays fast: mlflow is imported at the first call."""
    code = (
        "import sys, orchestrator.registry; "
        "print({'mlflow', 'torch', 'ray', 'transformers'} & set(sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "set()"


def moves(*steps: tuple[int | None, int | None, Kind], alias: str = "champion") -> list[Move]:
    return [Move(alias, number, *step) for number, step in enumerate(steps, start=1)]


FIRST: tuple[int | None, int, Kind] = (None, 1, "promoted")
SECOND: tuple[int | None, int, Kind] = (1, 2, "promoted")


@pytest.mark.parametrize(
    ("history", "current", "before"),
    [
        ([], 1, None),
        (moves(FIRST), 1, None),
        (moves(FIRST, SECOND), 2, 1),
        (moves(FIRST, SECOND, (2, 3, "forced"), (3, 2, "rollback")), 2, 1),
        (moves(FIRST, SECOND, (2, 3, "search"), (3, 2, "rollback"), (2, 1, "rollback")), 1, None),
        (moves(FIRST, (1, 3, "promoted")) + moves(SECOND, alias="challenger"), 3, 1),
        (moves((7, 2, "promoted")), 2, 7),
        (moves(FIRST, SECOND, (2, None, "elsewhere"), (None, 3, "set")), 3, 2),
        (moves(FIRST, SECOND), 5, 2),
    ],
)
def test_rollback_goes_back_one_move_at_a_time(
    history: list[Move], current: int, before: int | None
) -> None:
    assert former_holder(history, "champion", current) == before


def test_moves_are_read_in_order_and_what_is_none_is_passed_over() -> None:
    """A run's parameters come in any order, and those that are no moves are ignored."""
    history = moves(FIRST, *((number, number + 1, "set") for number in range(1, 12)))
    params = {move.key: move.text() for move in reversed(history)}
    params |= {
        "lr": "0.1",
        "champion.000099": "{}",
        "champion.000098": history[0].text(),
        "x": "[1]",
    }
    assert read_moves(params) == history


def test_log_entries_merge_between_a_runs_start_and_end() -> None:
    """Reports merge into one call, and none moves past its run's start or end."""
    entries = [
        LogEntry("start", "a"),
        LogEntry("log", "a", [("m", 1.0, 1, 1)]),
        LogEntry("log", "b", [("m", 5.0, 1, 1)]),
    ]
    entries += [
        LogEntry("log", "a", [("m", 2.0, 2, 2)]),
        LogEntry("end", "a"),
        LogEntry("log", "a", [("m", 3.0, 3, 3)]),
    ]
    shape = [
        (entry.kind, entry.trial, [point[1] for point in entry.metrics])
        for entry in coalesce(entries)
    ]
    assert shape == [
        ("start", "a", []),
        ("log", "a", [1.0, 2.0]),
        ("log", "b", [5.0]),
        ("end", "a", []),
        ("log", "a", [3.0]),
    ]


def test_log_entries_survive_on_disk(tmp_path: Path) -> None:
    entries = [
        LogEntry("log", "a", [("m", 1.0, 1, 1)], tags={"k": "ü\n"}),
        LogEntry("finish", status="KILLED"),
    ]
    save_entries(tmp_path / "sub" / "left.jsonl", entries)
    assert load_entries(tmp_path / "sub" / "left.jsonl") == entries


def test_long_values_are_cut_and_say_so() -> None:
    assert as_texts({"init": {"text": "x"}}, 6000) == {"init": '{"text": "x"}'}
    cut = as_texts({"p": "x" * 9000}, 6000)["p"]
    assert len(cut) == 6000 and cut.endswith("... (9000 characters)")


def test_a_childs_name_tells_trials_apart() -> None:
    config = {
        "init": {"text": "Classify"},
        "num_virtual_tokens": 20,
        "learning_rate": 0.30000001,
        "seed": 2,
    }
    assert run_label(config, "t1") == "text 'Classify', 20 tokens, lr 0.3, seed 2"
    assert run_label({}, "t1") == "t1"
