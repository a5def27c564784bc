"""Working directories of any name: the default registry is inside, and MLflow finds it there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import BadInput
from orchestrator.registry import Registry
from orchestrator.registry.store import normalised, quoted_path, sqlite_file

MakeArtifact = Callable[..., Path]
ODD = [
    "what now?x", "a#b", "50%", "a%20b", "a%3Fb", "a;b", "ü ñ 字", "a&b=c", "a:b", "file:x", "it's",
    'a"c', "[x]", "~x", "$HOME", ":memory:", "a?b#c%41;d", "x?mode=memory", "a\\b", "-x",
]  # fmt: skip
MLFLOW = """
import sys, mlflow
uri = "sqlite:///mlflow.db"
client = mlflow.MlflowClient(uri, uri)
mlflow.set_tracking_uri(uri)
run = client.get_model_version_by_alias("odd", "champion").run_id
print([file.path for file in client.list_artifacts(run, "seen")])
mlflow.artifacts.download_artifacts("models:/odd@champion")
"""


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    Registry(f"sqlite:///{file}").check()
    return file


def working_in(folder: Path, database: Path, patch: pytest.MonkeyPatch) -> Registry:
    """Return a folder's default registry on a copied database.

    The database is copied because making its schema takes seconds.
    """
    folder.mkdir()
    shutil.copy(database, folder / "mlflow.db")
    patch.chdir(folder)
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Registry(cache_dir=folder.parent / "cache")


def fill(registry: Registry, artifact: Path) -> None:
    with registry.start_search("odd", {"a": 1}, {}) as search:
        run_id = search.run_id
    registry.log_files(run_id, {"seen/page.html": b"here"})
    registry.auto_alias("odd", registry.register(artifact, "odd", run_id))


@pytest.mark.parametrize("name", ODD)
def test_everything_is_inside_a_folder_of_any_name(
    name: str,
    empty_database: Path,
    tmp_path: Path,
    make_artifact: MakeArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The database and the artifacts are inside the folder, and nothing is beside it.

    They are also found from another working directory.
    """
    around = tmp_path / "around"
    around.mkdir()
    registry = working_in(around / name, empty_database, monkeypatch)
    registry.check_search_end("odd", "odd")
    fill(registry, make_artifact())
    assert sorted(file.name for file in around.iterdir()) == sorted([name, "cache"])
    assert sorted(file.name for file in (around / name).iterdir()) == ["mlflow.db", "mlruns"]
    monkeypatch.chdir("/")
    shutil.rmtree(around / "cache")
    assert Registry(registry.tracking_uri, cache_dir=around / "cache").fetch("odd", 1).is_dir()
    assert registry.aliases("odd") == {"champion": 1, "challenger": 1}


def test_mlflow_finds_what_is_in_such_a_folder(
    empty_database: Path,
    tmp_path: Path,
    make_artifact: MakeArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLflow's default address in the same folder finds the model and its run's files."""
    fill(
        working_in(tmp_path / "what now?x #1 50%25;ü", empty_database, monkeypatch), make_artifact()
    )
    done = subprocess.run(
        [sys.executable, "-c", MLFLOW], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.strip() == "['seen/page.html']", done.stderr


def test_a_schema_is_made_in_a_folder_with_a_question_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a%20b?c"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Registry().check()
    assert [file.name for file in tmp_path.iterdir()] == ["a%20b?c"]
    assert [file.name for file in folder.iterdir()] == ["mlflow.db"]


@given(
    st.lists(
        st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1), min_size=1
    )
)
def test_an_address_names_the_path_that_it_was_made_of(folders: list[str]) -> None:
    """SQLAlchemy, which MLflow connects with, and we read the same path.

    Normalising the address changes nothing.
    """
    path = os.path.normpath("/" + "/".join(folders))
    address = "sqlite:///" + quoted_path(path)
    assert unquote(quoted_path(path)) == path
    assert str(sqlite_file(normalised(address))) == path
    if "\n" not in path:
        assert sa.engine.make_url(address).database == path


def test_an_ordinary_path_is_written_as_it_is() -> None:
    """Spaces and a lone percent sign are not escaped: stored addresses stay the same."""
    for path in ("/data/mlflow.db", "/my data/50%/ü/mlflow.db"):
        assert normalised(f"sqlite:///{path}") == f"sqlite:///{path}"
    assert normalised("sqlite:////data/x.db?timeout=5&check_same_thread=false").endswith(
        "x.db?timeout=5&check_same_thread=false"
    )


@pytest.mark.parametrize(
    "uri", ["sqlite:////tmp/what now?x/mlflow.db", "sqlite:////tmp/really?/a=b.db"]
)
def test_a_question_mark_that_cuts_a_path_short_is_refused(uri: str) -> None:
    """SQLAlchemy would open the file before the mark and drop the rest."""
    with pytest.raises(BadInput, match="ends at the question mark") as refused:
        Registry(uri)
    assert "%3F" in refused.value.hint
