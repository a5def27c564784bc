"""Uploading an exported prompt to a stand-in for the hub, through the hub's own client."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import READ_TOKEN, TOKEN, Hub, Repository
from huggingface_hub import ModelCard, constants
from peft import PeftConfig
from small_jobs import Command, Said
from test_exchange import Store, moved_prompt

from orchestrator.artifact.peft import export_peft
from orchestrator.cli.workbench.hub import base_licence, push_folder
from orchestrator.errors import JobFailed

REPOSITORY = "ann/spam-prompt"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client talks to, as if HF_ENDPOINT and HF_TOKEN had been set before."""
    running = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", running.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has LFS only
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield running
    running.stop()


def pushed(command: Command, folder: Path, *options: str) -> Said:
    return command("export", "prompt:1", folder, "--push", REPOSITORY, *options, "--json")


def check_refused(said: Said, code: int, message: str, step: str) -> None:
    """Check exit code, message and next step, and that no token is shown."""
    error = said.document["error"]
    assert said.code == code, said.out
    assert message in error["message"] and step in error["next"]
    assert TOKEN not in said.out + said.err and READ_TOKEN not in said.out + said.err


def test_a_pushed_folder_is_on_the_hub(
    hub: Hub, store: Store, command: Command, tmp_path: Path
) -> None:
    """The new repository has the folder's files; its card names it, and metadata pass the hub's.

    Weights travel by LFS, as on the real hub.
    """
    said = pushed(command, tmp_path / "adapter")
    assert said.code == 0, said.err
    assert said.document["repository"] == {
        "id": REPOSITORY, "url": f"{hub.address}/{REPOSITORY}", "private": False,
    }  # fmt: skip
    repository = hub.repositories[REPOSITORY]
    assert sorted(repository.files) == FILES and not repository.private
    for name, content in repository.files.items():
        assert content == (tmp_path / "adapter" / name).read_bytes()
    assert len(hub.objects) == 1 and "POST /api/validate-yaml" in hub.requests
    card = ModelCard(repository.files["README.md"].decode())
    assert card.data.library_name == "peft" and f"'{REPOSITORY}'" in card.text
    assert f"hf download {REPOSITORY} --local-dir spam-prompt" in card.text
    assert TOKEN not in card.text
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).num_virtual_tokens == 3
    assert "is not on the hub" in said.document["warning"]


def test_the_page_names_the_repository(
    hub: Hub, store: Store, command: Command, tmp_path: Path
) -> None:
    """People see the address, the card and the name by which PEFT loads the prompt."""
    lines = command(
        "export", "prompt:1", tmp_path / "adapter", "--push", REPOSITORY, "--private"
    ).out.splitlines()
    assert f"It is on the hub: {hub.address}/{REPOSITORY}" in lines
    assert f"Its model card is {tmp_path / 'adapter' / 'README.md'}." in lines
    assert f"next: PeftModel.from_pretrained(base, '{REPOSITORY}') in Python" in lines
    assert hub.repositories[REPOSITORY].private


def test_what_a_push_refuses_before_it_writes(
    hub: Hub, store: Store, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad names, no or wrong tokens and existing repositories exit with 2, nothing written."""
    folder = tmp_path / "adapter"
    for name in ("spam", "a/b/c", "ann/-spam", "ann/a--b"):
        said = command("export", "prompt:1", folder, "--push", name, "--json")
        check_refused(said, 2, f"--push {name!r} names no repository", "OWNER/NAME")
    assert hub.requests == []
    hub.repositories[REPOSITORY] = Repository(private=False)
    check_refused(pushed(command, folder), 2, "exists already", f"hf upload {REPOSITORY} DIR")
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrong")
    check_refused(pushed(command, folder), 2, "does not accept the token", "settings/tokens")
    monkeypatch.delenv("HF_TOKEN")
    check_refused(pushed(command, folder), 2, "no token", "hf auth login")
    lone = command("export", "prompt:1", folder, "--private", "--json")
    check_refused(lone, 2, "--private is about the repository", "--push")
    assert not folder.exists() and hub.repositories[REPOSITORY].files == {}


def test_an_offline_or_unreachable_hub_exits_with_3(
    hub: Hub, store: Store, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HF_HUB_OFFLINE, a closed port and a failing server are told apart; nothing is written."""
    folder = tmp_path / "adapter"
    hub.failing["info"] = 503
    check_refused(pushed(command, folder), 3, "the hub answers 503", "wait")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    check_refused(pushed(command, folder), 3, "does not answer", "HF_ENDPOINT")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check_refused(pushed(command, folder), 3, "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE")
    assert not folder.exists() and hub.repositories == {}


@pytest.mark.parametrize(
    ("step", "status", "code", "message"),
    [
        ("create", 403, 2, "may not write to ann/spam-prompt"),
        ("create", 409, 2, "exists already"),
        ("validate", 400, 1, "refuses the card's metadata"),
        ("commit", 500, 3, "answers 500"),
        ("commit", 413, 2, "commit fails"),
    ],
)
def test_a_push_that_fails_leaves_the_folder_whole(
    hub: Hub, store: Store, command: Command, tmp_path: Path,
    step: str, status: int, code: int, message: str,
) -> None:  # fmt: skip
    """Whatever fails after the folder is written, the message says how to upload it later."""
    hub.failing[step] = status
    folder = tmp_path / "adapter"
    said = pushed(command, folder)
    check_refused(said, code, message, f"hf upload {REPOSITORY} {folder} .")
    assert f"{folder} is complete" in said.document["error"]["message"]
    assert sorted(file.name for file in folder.iterdir()) == FILES
    again = tmp_path / "again"
    assert command("export", "prompt:1", again, "--card").code == 0
    for name in FILES[1:]:
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_a_token_that_may_only_read_is_refused(
    hub: Hub, store: Store, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub answers 403 to a read token; no repository is left behind."""
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    said = pushed(command, tmp_path / "adapter")
    check_refused(said, 2, "may not write", "a token that may write")
    assert hub.repositories == {}


def test_the_hub_refuses_wrong_metadata_before_a_repository_exists(
    hub: Hub, store: Store, tmp_path: Path
) -> None:
    """The card goes through the hub's validation first, whose words are passed on."""
    artifact = moved_prompt(store.backbone, "prompt")
    folder = export_peft(artifact, tmp_path / "adapter", "x")
    card = ModelCard("---\nbase_model: /a/b/c\n---\n# x\n")
    with pytest.raises(JobFailed, match="metadata: Repo id must be in the form"):
        push_folder(folder, REPOSITORY, card, private=False)
    assert hub.repositories == {}


def test_a_licence_is_looked_up_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub model's licence is that of its card; offline or for an unknown model it is empty."""
    hub.cards["some/model"] = {"license": "mit"}
    assert base_licence("some/model", "main") == "mit"
    assert base_licence("some/other", "main") == ""
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert base_licence("some/model", "main") == "" and len(hub.requests) == asked


@pytest.mark.long
def test_the_environment_names_the_hub(store: Store, tmp_path: Path) -> None:
    """HF_ENDPOINT and HF_TOKEN are read as by the hub's other programs, in a process of its own.

    Here the client's newer upload runs too, since the stand-in takes all files as small ones.
    """
    hub = Hub(large_files=False)
    environment = {
        **os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    try:
        said = subprocess.run(
            [sys.executable, "-m", "orchestrator", "export", "prompt:1", str(tmp_path / "adapter"),
             "--push", REPOSITORY, "--json"],
            env=environment, cwd=store.folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        hub.stop()
    assert said.returncode == 0, said.stderr
    assert json.loads(said.stdout)["repository"]["url"] == f"{hub.address}/{REPOSITORY}"
    assert sorted(hub.repositories[REPOSITORY].files) == FILES
