"""The folder of Ray's sockets: an unusable temporary folder is replaced or refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from orchestrator.cluster.ray_folder import LONGEST, SOCKET_BYTES, ray_temp_dir, ray_temp_note
from orchestrator.errors import BadInput

START = """
from orchestrator.cluster.ray_folder import ray_temp_note
from orchestrator.cluster.session import ray_session
with ray_session() as ours:
    import ray
    print(ours, ray._private.worker._global_node.get_session_dir_path())
print(ray_temp_note())
"""


def temporary(patch: pytest.MonkeyPatch, folder: str, variable: str = "TMPDIR") -> None:
    patch.delenv("RAY_TMPDIR", raising=False)
    patch.setenv(variable, folder)
    patch.setattr(tempfile, "tempdir", folder if variable == "TMPDIR" else "/tmp")


def of_length(length: int) -> str:
    return "/" + "x" * (length - 1)


def test_the_longest_folder_still_fits_a_socket() -> None:
    """Ray appends the session's and the socket's names; the path still fits."""
    session = (
        f"{of_length(LONGEST)}/ray/session_2026-01-31_23-59-59_999999_4194304/sockets/plasma_store"
    )
    assert len(session) == SOCKET_BYTES


@pytest.mark.parametrize("folder", ["/tmp", of_length(LONGEST), "/scratch/job 1", "/t/a?b#c%20"])
def test_a_folder_that_ray_can_use_stays(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary(monkeypatch, folder)
    assert ray_temp_dir() is None and ray_temp_note() == ""


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        (of_length(LONGEST + 1), f"at most {LONGEST}"),
        ("/" + "字" * 13, f"40 bytes, at most {LONGEST}"),
        ("/tmp/ü", "can't read"),
        ("/tmp/it's", "can't read"),
        ('/tmp/a"b', "can't read"),
        ("/tmp/a\nb", "can't read"),
    ],
)
@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_that_ray_can_not_use_is_replaced(
    folder: str, reason: str, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The note names the variable and the fault; an unwritable substitute is refused."""
    temporary(monkeypatch, folder, variable)
    assert ray_temp_dir() == "/tmp/ray"
    assert reason in ray_temp_note() and ray_temp_note().startswith(f"{variable} ")
    with pytest.raises(BadInput, match=f"{variable} .* can't be written instead") as refused:
        ray_temp_dir(tmp_path / "absent")
    assert f"at most {LONGEST} bytes" in refused.value.hint


@pytest.mark.ray
def test_ray_starts_under_a_long_temporary_folder(tmp_path: Path) -> None:
    """Ray starts under a long path as batch systems make it, here with letters unusable for Ray."""
    folder = (
        tmp_path / "a_rather_long_directory_name_as_batch_schedulers_make_them" / "jöb_0123456789"
    )
    folder.mkdir(parents=True)
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_TMPDIR")
    }
    done = subprocess.run(
        [sys.executable, "-c", START],
        env=environment | {"TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("True /tmp/ray/session_") and second.startswith(
        f"TMPDIR {folder} is too long"
    )
