"""Environment variables, loggers and schema revisions of MLflow. Checked on MLflow 3.17."""

from __future__ import annotations

import logging
import os
from pathlib import Path

# MLflow's own defaults would stall for minutes on an outage (7 retries of 120 s), copy a uv.lock
# found in the working directory into the model, draw progress bars for kilobytes, and print an
# address for each run that ends.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def set_defaults() -> None:
    """Put our defaults into this process's environment; a value that is set already is kept."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def quiet_loggers() -> None:
    """Silence MLflow's loggers, and those of its libraries, unless the user has set their level.

    MLflow sets its own level when it is imported, so this comes after the import.
    """
    if "MLFLOW_LOGGING_LEVEL" in os.environ:
        return
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    # MLflow logs a traceback for each database error, and raises the error too.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # Alembic logs each step in which a new database gets its schema.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # urllib3 logs each retry. The final error has all the information.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def known_schema(revision: str) -> bool:
    """Tell whether the installed MLflow knows this schema revision."""
    import mlflow.store.db_migrations

    versions = Path(mlflow.store.db_migrations.__path__[0]) / "versions"
    return any(versions.glob(f"{revision}_*.py"))
