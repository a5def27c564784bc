"""Many concurrent searches on one store, and a registry of many models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from filled_store import fill
from postgres import Cluster

from orchestrator.registry import Registry

PROCESSES, EACH, TRIALS, REPORTS = 4, 4, 2, 15

WRITER = f"""
import sys, threading
from orchestrator.registry import Registry

def search(number):
    registry = Registry(sys.argv[1])
    with registry.start_search(f"search-{{number}}", {{"number": number}}, {{}}, \
patience=200) as log:
        for trial in range({TRIALS}):
            log.trial_started(f"t{{trial}}", {{"seed": trial}})
        for step in range({REPORTS}):
            for trial in range({TRIALS}):
                log.trial_metrics(f"t{{trial}}", step, \
{{"loss": number + step / 100, "accuracy": 0.5}})
        for trial in range({TRIALS}):
            log.trial_ended(f"t{{trial}}", "finished")

first = int(sys.argv[2])
threads = [threading.Thread(target=search, args=(first + one,)) for one in range({EACH})]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.long)])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/mlflow.db"
    cluster: Cluster = request.getfixturevalue("postgres")
    return cluster.database("writers")


@pytest.mark.long
@pytest.mark.slow
def test_sixteen_searches_at_once_lose_nothing(store_uri: str, tmp_path: Path) -> None:
    """Four processes of four searches each lose no run, no point and no end."""
    Registry(store_uri).check()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, store_uri, str(first)],
            cwd=tmp_path,
            stderr=subprocess.PIPE,
        )
        for first in range(0, PROCESSES * EACH, EACH)
    ]
    said = [process.communicate(timeout=280)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES, said
    engine = sa.create_engine(store_uri)
    tables = sa.MetaData()
    tables.reflect(engine, only=["runs", "metrics", "experiments", "params"])
    runs, metrics = tables.tables["runs"], tables.tables["metrics"]
    searches = PROCESSES * EACH
    with engine.connect() as connection:
        states = connection.execute(
            sa.select(runs.c.status, sa.func.count()).group_by(runs.c.status)
        ).all()
        assert [tuple(row) for row in states] == [("FINISHED", searches * (1 + TRIALS))]
        points = connection.execute(
            sa.select(metrics.c.run_uuid, metrics.c.key, metrics.c.step)
        ).all()
        assert len(points) == len(set(points)) == searches * TRIALS * REPORTS * 2
        total = connection.execute(
            sa.select(sa.func.sum(metrics.c.value)).where(metrics.c.key == "loss")
        ).scalar_one()
        wanted = (
            sum(number + step / 100 for number in range(searches) for step in range(REPORTS))
            * TRIALS
        )
        assert total == pytest.approx(wanted)
    engine.dispose()
    assert not list(tmp_path.glob("mlflow-unwritten*"))


def test_a_listing_reads_models_and_no_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of statements does not grow with models and versions.

    60 models of 3 versions take as many as 2 models of 1.
    """
    counts = []
    for models, versions in ((2, 1), (60, 3)):
        uri = f"sqlite:///{tmp_path}/{models}.db"
        registry = Registry(uri)
        registry.check()
        fill(uri, models, versions)
        monkeypatch.setattr(registry._store.client, "search_model_versions", refused)
        monkeypatch.setattr(registry._store.client, "get_model_version", refused)
        statements: list[str] = []

        def seen(*arguments: Any, into: list[str] = statements) -> None:
            into.append(arguments[2])

        sa.event.listen(sa.engine.Engine, "before_cursor_execute", seen)
        try:
            listed = registry.list_models()
        finally:
            sa.event.remove(sa.engine.Engine, "before_cursor_execute", seen)
        counts.append(len([it for it in statements if it.startswith("SELECT")]))
        assert len(listed) == models and {model.latest for model in listed} == {versions}
        assert listed[0].champion_metrics == {"test": {"accuracy": 0.9}}
    assert counts[0] == counts[1]


def refused(*_: Any, **__: Any) -> None:
    raise AssertionError("a listing must not read versions")
