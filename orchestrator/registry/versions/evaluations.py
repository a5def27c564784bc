"""Evaluation results of a registered prompt on other data, stored with its version."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from orchestrator.data.outcomes.rows import RowOutcomes
from orchestrator.registry.aliases.gate import EVALUATION_TAG
from orchestrator.registry.aliases.moves import who
from orchestrator.registry.runs.entries import MAX_TAG, as_texts
from orchestrator.registry.runs.searches import experiment_named
from orchestrator.registry.store import Store
from orchestrator.registry.versions.outcomes import write_outcomes
from orchestrator.registry.versions.records import VersionSummary

READABLE_TAG = "evaluated."
MODEL_ID = re.compile(r"m-[0-9a-f]{32}")


@dataclass(frozen=True)
class EvaluationRecord:
    """Metrics on a set of rows.

    ``group`` is COLUMN=VALUE, or empty for all rows. ``fingerprint`` is the sha256 of the rows.
    """

    data: str
    split: str
    group: str
    rows: int
    fingerprint: str
    metrics: dict[str, float]
    outcomes: RowOutcomes | None = None
    """The outcomes of the rows, from which the gate tells how sure a difference is."""

    def facts(self) -> dict[str, Any]:
        """Return everything but the outcomes, in JSON's types."""
        return asdict(replace(self, outcomes=None)) | {"outcomes": self.outcomes is not None}

    @property
    def label(self) -> str:
        """The key in MLflow, for example uci_sentiment.test or uci_sentiment.test.source-imdb."""
        path = PurePath(self.data)
        name = f"{path.parent.name}.{path.stem}" if path.suffix else f"{self.data}.{self.split}"
        return re.sub(
            r"[^A-Za-z0-9_.-]+", "-", f"{name}.{self.group}" if self.group else name
        ).strip("-.")[:150]


def read_evaluations(version: VersionSummary) -> list[EvaluationRecord]:
    """Read the evaluation results that are stored with a version, without their outcomes."""
    return [
        record
        for tag, text in sorted(version.tags.items())
        if tag.startswith(EVALUATION_TAG) and (record := _read(text)) is not None
    ]


def _read(text: str) -> EvaluationRecord | None:
    try:
        facts = json.loads(text)
        metrics = {str(name): float(value) for name, value in facts["metrics"].items()}
        return EvaluationRecord(
            data=str(facts["data"]),
            split=str(facts["split"]),
            group=str(facts["group"]),
            rows=int(facts["rows"]),
            fingerprint=str(facts["fingerprint"]),
            metrics=metrics,
        )
    except (KeyError, ValueError, TypeError, AttributeError):  # users can edit tags
        return None


def log_evaluations(
    store: Store, version: VersionSummary, records: Sequence[EvaluationRecord]
) -> str:
    """Create a run with the metrics, tag the version with them, and return the run's ID.

    The run is linked to the version's logged model. Each set of rows has a tag of its own, so that
    concurrent evaluations don't overwrite each other.
    """
    from mlflow.entities import LoggedModelInput

    client = store.client
    model = MODEL_ID.search(
        client.get_model_version_download_uri(version.name, str(version.version))
    )
    params = {
        f"{place}.{key}": value
        for place, it in enumerate(records)
        for key, value in it.facts().items()
        if key not in ("metrics", "outcomes")
    }
    name = f"evaluate {version.name}:{version.version}"
    tags = {
        "orchestrator.evaluates": f"{version.name}:{version.version}",
        "mlflow.source.name": "orchestrator",
    }
    run = client.create_run(
        _experiment(store, version), tags=as_texts(tags, MAX_TAG), run_name=name
    )
    run_id = str(run.info.run_id)
    try:
        for key, text in as_texts(params, MAX_TAG).items():
            client.log_param(run_id, key, text)
        if model:
            client.log_inputs(run_id, models=[LoggedModelInput(model.group())])
        _log_outcomes(store, run_id, records)
        for record in records:
            for metric, value in record.metrics.items():
                client.log_metric(
                    run_id,
                    f"{record.label}/{metric}",
                    value,
                    dataset_name=record.label,
                    dataset_digest=record.fingerprint[:36],
                    model_id=model.group() if model else None,
                )
            _tag(store, version, record, run_id)
        client.set_terminated(run_id)
    except BaseException:
        client.set_terminated(run_id, "FAILED")
        raise
    return run_id


def _log_outcomes(store: Store, run_id: str, records: Sequence[EvaluationRecord]) -> None:
    found = {it.fingerprint: it.outcomes for it in records if it.outcomes is not None}
    if found:
        with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
            write_outcomes(Path(scratch), found)
            store.client.log_artifacts(run_id, scratch)


def _tag(store: Store, version: VersionSummary, record: EvaluationRecord, run_id: str) -> None:
    document = {
        **record.facts(),
        "run_id": run_id,
        "by": who(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    shown = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
    number = str(version.version)
    client = store.client
    client.set_model_version_tag(
        version.name, number, EVALUATION_TAG + record.fingerprint, json.dumps(document)
    )
    client.set_model_version_tag(
        version.name, number, READABLE_TAG + record.label, f"{shown} ({record.rows} rows)"
    )


def _experiment(store: Store, version: VersionSummary) -> str:
    """Return the experiment of the version's own run.

    If that run is gone, return the experiment that has the model's name.
    """
    from mlflow.exceptions import MlflowException

    if version.run_id:
        try:
            return str(store.client.get_run(version.run_id).info.experiment_id)
        except MlflowException:
            pass
    return str(experiment_named(store, version.name).experiment_id)
