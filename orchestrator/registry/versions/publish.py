"""Publishing an artifact: a logged model and a version of a registered model, or neither.

The version's source is the logged model, not the run, so it outlives the run's deletion and
``mlflow gc``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.artifact import MANIFEST, WEIGHTS, Manifest, PromptArtifact, file_sha256
from orchestrator.data.cells import cell_text
from orchestrator.data.conversations import is_conversation
from orchestrator.data.outcomes.rows import RowOutcomes
from orchestrator.data.source_row import Row
from orchestrator.job.spec import template_columns
from orchestrator.registry.aliases.ledger import LEDGER_TAG, new_ledger
from orchestrator.registry.runs.entries import as_texts
from orchestrator.registry.store import Store
from orchestrator.registry.versions.outcomes import write_outcomes
from orchestrator.registry.versions.records import DIGEST_TAG, FACTS_TAG, FORMAT_TAG, KIND, KIND_TAG

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

ARTIFACT_PATH = "artifacts/prompt"
"""The path of the artifact's two files in a version, chosen by ``mlflow.pyfunc.save_model``."""
MODEL_VERSIONS_TAG = "mlflow.modelVersions"
"""A logged model's tag: MLflow's link to the versions created from it."""
READY_SECONDS = 60
MAX_VERSION_TAG = 100_000


def publish(
    store: Store,
    folder: Path,
    name: str,
    run_id: str,
    tags: Mapping[str, Any],
    description: str,
    example: Row | None,
    outcomes: Mapping[str, RowOutcomes] = {},
) -> int:
    """Log the artifact, create a version from it, and return the version's number.

    After any error, neither a version nor a ready logged model remains. ``example`` is a row that
    MLflow's page shows and that ``mlflow models predict`` can be tried with. ``outcomes`` are
    those of the rows of a fingerprint.
    """
    manifest = PromptArtifact.load(folder).manifest
    client = store.client
    run = client.get_run(run_id)
    model = client.create_logged_model(
        run.info.experiment_id,
        "prompt",
        run_id,
        as_texts(plain_tags(manifest), 5000),
        model_type=KIND,
    )
    try:
        _upload(store, folder, manifest, model, example, outcomes)
        # Logging the model as an output shows it on the run's page.
        from mlflow.entities import LoggedModelOutput

        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, manifest.steps)])
        version_tags = as_texts(
            {**tags, **plain_tags(manifest), **machine_tags(manifest, folder)}, MAX_VERSION_TAG
        )
        return _create_version(store, name, model, version_tags, description)
    except BaseException:
        with suppress(Exception):
            client.delete_logged_model(model.model_id)
        raise


def _upload(
    store: Store,
    folder: Path,
    manifest: Manifest,
    model: LoggedModel,
    example: Row | None,
    outcomes: Mapping[str, RowOutcomes],
) -> None:
    with tempfile.TemporaryDirectory(prefix="orchestrator-") as scratch:
        prompt = Path(scratch, "prompt")
        prompt.mkdir()
        for file in (WEIGHTS, MANIFEST):
            shutil.copyfile(folder / file, prompt / file)
        package = Path(scratch, "model")
        save_pyfunc(package, prompt, manifest, model, example or {})
        write_outcomes(package, outcomes)
        store.client.log_model_artifacts(model.model_id, str(package))
    store.client.finalize_logged_model(model.model_id, "READY")


def save_pyfunc(
    package: Path, prompt: Path, manifest: Manifest, model: LoggedModel, example: Row
) -> None:
    """Write the folder that MLflow loads as a model, without a pickle or a path of this machine."""
    import mlflow
    from mlflow.models import Model

    description = Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        model_id=model.model_id,
        run_id=model.source_run_id,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            package,
            python_model=str(Path(__file__).with_name("pyfunc_model.py")),
            artifacts={"prompt": str(prompt)},
            mlflow_model=description,
            # Given explicitly, because MLflow would run a prediction to infer it.
            signature=signature(manifest),
            input_example=input_example(manifest, example),
            # Given explicitly, because MLflow would start processes that run the model to infer
            # them.
            pip_requirements=[
                f"prompt-orchestrator>={own_version()}",
                f"mlflow>={mlflow.__version__}",
            ],
        )
    flavor = description.flavors["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    flavor["artifacts"]["prompt"]["uri"] = flavor["artifacts"]["prompt"]["path"]
    description.save(str(package / "MLmodel"))


def signature(manifest: Manifest) -> ModelSignature:
    """Build the model's signature.

    Its inputs are the template's columns, of any type that can be written as text. Its output is
    left open, because labels have several types.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema
    from mlflow.types.schema import AnyType

    columns = dict.fromkeys(template_columns(manifest.template))
    required = manifest.cells is None or manifest.cells.empty == "refuse"
    return ModelSignature(
        inputs=Schema([ColSpec(AnyType(), name, required=required) for name in columns])
    )


def input_example(manifest: Manifest, row: Row) -> pd.DataFrame:
    """Build one row of texts or messages; an unknown column gets a placeholder with its name."""
    import pandas as pd

    names = dict.fromkeys(template_columns(manifest.template))
    cells = {name: row.get(name, f"some {name}") for name in names}
    texts = {
        name: cell if manifest.chat and is_conversation(cell) else cell_text(cell)
        for name, cell in cells.items()
    }
    return pd.DataFrame([texts])


def _create_version(
    store: Store, name: str, model: LoggedModel, tags: dict[str, str], description: str
) -> int:
    client = store.client
    made_here = _ensure_registered_model(store, name)
    version: int | None = None
    try:
        # Pass the location and not models:/ID, because an SQL store would look up that ID at
        # MLflow's process-wide address.
        entity = client.create_model_version(
            name,
            model.artifact_location,
            model.source_run_id,
            tags,
            description=description,
            await_creation_for=0,
            model_id=model.model_id,
        )
        version = int(entity.version)
        _await_ready(store, name, version)
        client.set_logged_model_tags(
            model.model_id, {MODEL_VERSIONS_TAG: json.dumps([{"name": name, "version": version}])}
        )
        return version
    except BaseException:
        with suppress(Exception):
            if version is not None:
                client.delete_model_version(name, str(version))
            if made_here:
                client.delete_registered_model(name)
        raise


def _await_ready(store: Store, name: str, version: int) -> None:
    from mlflow.exceptions import MlflowException

    deadline = time.monotonic() + READY_SECONDS
    while (entity := store.client.get_model_version(name, str(version))).status != "READY":
        if entity.status == "FAILED_REGISTRATION" or time.monotonic() > deadline:
            raise MlflowException(
                f"version {version} of {name} is {entity.status}: {entity.status_message}"
            )
        time.sleep(0.5)


def _ensure_registered_model(store: Store, name: str) -> bool:
    """Create the registered model, or describe one that has no description yet.

    Returns True if the model was created.
    """
    from mlflow.exceptions import MlflowException

    client = store.client
    text = (
        "Soft prompts found by prompt-orchestrator. Ask the champion: "
        f'`orchestrator query {name} "text"`.'
    )
    try:
        model = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        # Created with the model, so that no other program can create a second history.
        ledger = new_ledger(store, name)
        try:
            client.create_registered_model(name, {KIND_TAG: KIND, LEDGER_TAG: ledger}, text)
            return True
        except MlflowException as other:
            client.delete_run(ledger)
            if other.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        model = client.get_registered_model(name)
    if model.tags.get(KIND_TAG) != KIND:
        client.set_registered_model_tag(name, KIND_TAG, KIND)
    if not model.description:
        client.update_registered_model(name, text)
    return False


def plain_tags(manifest: Manifest) -> dict[str, Any]:
    """Build the tags that people filter and compare by in MLflow's UI."""
    tags: dict[str, Any] = {
        "method": manifest.method,
        "base_model": manifest.base_model.id,
        "base_model_fingerprint": manifest.base_model.fingerprint,
        "num_virtual_tokens": manifest.num_virtual_tokens,
        "data": manifest.data.path,
        "data_fingerprint": manifest.data.fingerprint,
        "search": manifest.search,
        "trial": manifest.trial,
        "steps": manifest.steps,
    }
    tags |= {key: value for key, value in manifest.config.items() if key not in tags}
    for split, metrics in manifest.metrics.items():
        tags |= {f"{split}_{metric}": f"{value:.6g}" for metric, value in metrics.items()}
    return tags


def machine_tags(manifest: Manifest, folder: Path) -> dict[str, str]:
    """Build the tags that this program reads back."""
    facts = {
        "config": manifest.config,
        "metrics": manifest.metrics,
        "baselines": manifest.baselines,
    }
    return {
        FORMAT_TAG: str(manifest.format_version),
        DIGEST_TAG: file_sha256(folder / MANIFEST),
        FACTS_TAG: json.dumps(facts),
    }


def own_version() -> str:
    try:
        return package_version("prompt-orchestrator")
    except PackageNotFoundError:  # running from a checkout that is not installed
        return "0"
