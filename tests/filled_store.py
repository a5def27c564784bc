"""Fill a registry with many models by writing its tables; MLflow's API would take hours."""

from __future__ import annotations

import json
import time
from typing import Any

import sqlalchemy as sa


def fill(uri: str, models: int, versions: int) -> None:
    """Insert ``models`` registered models of ``versions`` versions each, tagged as by a search."""
    engine = sa.create_engine(uri)
    tables = sa.MetaData()
    tables.reflect(engine)
    now, table = int(time.time() * 1000), tables.tables
    names = [f"m{number:04}" for number in range(models)]
    each = [(name, version) for name in names for version in range(1, versions + 1)]
    note = json.dumps({"version": 1, "metrics": {"test": {"accuracy": 0.9}}})
    tags = {"orchestrator.kind": "soft-prompt", "orchestrator.champion": note}
    facts = json.dumps({"config": {}, "metrics": {"test": {"accuracy": 0.5}}, "baselines": {}})
    more = {f"tag{number}": "x" * 20 for number in range(20)} | {
        "orchestrator.facts": facts,
        "nearest": "n" * 2000,
    }
    common: dict[str, Any] = {"creation_time": now, "last_updated_time": now}
    rows: dict[str, list[dict[str, Any]]] = {
        "registered_models": [{"name": name, **common} for name in names],
        "registered_model_tags": [
            {"name": name, "key": key, "value": tags[key]} for name in names for key in tags
        ],
        "registered_model_aliases": [
            {"name": name, "alias": "champion", "version": 1} for name in names
        ],
        "model_versions": [
            {
                "name": name,
                "version": version,
                **common,
                "current_stage": "None",
                "source": "/x",
                "status": "READY",
            }
            for name, version in each
        ],
        "model_version_tags": [
            {"name": name, "version": version, "key": key, "value": value}
            for name, version in each
            for key, value in more.items()
        ],
    }
    with engine.begin() as connection:
        for name, values in rows.items():
            connection.execute(table[name].insert(), values)
    engine.dispose()
