"""The connection to MLflow: addresses, the client, and MLflow's errors translated into ours."""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from filelock import Timeout as LockTimeout

from orchestrator.errors import BadInput, JobFailed, OrchestratorError, Unreachable
from orchestrator.registry.mlflow_internals.settings import (
    known_schema,
    quiet_loggers,
    set_defaults,
)
from orchestrator.utils.garbage import uncollected
from orchestrator.utils.text import mask_secrets

if TYPE_CHECKING:
    from mlflow import MlflowClient

DEFAULT_URI = "sqlite:///mlflow.db"
SERVERS = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
CHECK_SECONDS = 8.0
LOCK_SECONDS = 120.0
SCHEMA_LOCK = 0x6F726368
"""The key of our PostgreSQL advisory lock: "orch" in ASCII."""

# MLflow's error codes for a refused request. Other codes mean that the store did not answer.
REFUSALS = frozenset(
    {
        "ALREADY_EXISTS",
        "INVALID_PARAMETER_VALUE",
        "INVALID_STATE",
        "NOT_FOUND",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
    }
)

# Errors from these modules, and OSError, may pass when the store is back. Any other exception is a
# bug in a program.
STORE_MODULES = frozenset(
    {"mlflow", "sqlalchemy", "requests", "urllib3", "sqlite3", "psycopg2", "pymysql", "pyodbc"}
)

OTHER_SCHEMA = re.compile(r"out-of-date database schema \(found version (\w+)")
READ_ONLY = re.compile(
    r"read-?only (database|transaction)|permission denied for (table|schema|database)",
    re.IGNORECASE,
)
SQLITE_OPTIONS = re.compile(r"[a-z_]+=[^/&]*(&[a-z_]+=[^/&]*)*")
LOGIN = re.compile(r"error code 40[13]\b")

Result = TypeVar("Result")


class Store:
    """A tracking store and a registry store.

    It connects on first use, and creates the schema of a new SQLite file then.
    """

    def __init__(self, tracking_uri: str | None = None, registry_uri: str | None = None) -> None:
        tracking = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        self.tracking_uri = normalised(tracking)
        self.registry_uri = normalised(
            registry_uri or os.environ.get("MLFLOW_REGISTRY_URI") or tracking
        )
        self._lock = threading.Lock()
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """The connected client, which threads may share."""
        with self._lock:
            if self._client is None:
                self._client = self._connect()
            return self._client

    @property
    def artifact_root(self) -> Path | None:
        """The folder of an SQLite store's artifacts; None for other stores.

        The folder lies beside the database, whatever the working directory is later. Other stores
        have a root of their own.
        """
        file = sqlite_file(self.tracking_uri)
        return file.parent / "mlruns" if file else None

    def check(self) -> None:
        """Raise Unreachable within about 10 s when a store does not answer.

        The check creates nothing but the schema of a new database.
        """
        import_mlflow()
        with self.translating("asking MLflow"):
            if self.tracking_uri.startswith(SERVERS):
                within(CHECK_SECONDS, self._probe)
                return
            # Creating the schema of a new database may take long, so the limit is on connecting.
            if sqlite_file(self.tracking_uri) is None:
                within(CHECK_SECONDS, self._knock)
            self._probe()

    def _knock(self) -> None:
        from sqlalchemy import create_engine

        engine = create_engine(self.tracking_uri)
        engine.connect().close()
        engine.dispose()

    def _probe(self) -> None:
        self.client.search_experiments(max_results=1)
        self.client.search_registered_models(max_results=1)

    @contextmanager
    def translating(self, doing: str) -> Iterator[None]:
        """Turn the errors of the MLflow calls in this block into ours."""
        try:
            yield
        except Exception as error:
            raise self.translate(error, doing) from error

    def translate(self, error: Exception, doing: str) -> OrchestratorError:
        """Return our error for an exception, with passwords masked.

        BadInput stands for a refused request, Unreachable for a store that did not answer,
        JobFailed for a bug in a program. Our own errors are returned unchanged.
        """
        if isinstance(error, OrchestratorError):
            return error
        text = mask_secrets(first_lines(str(error))) or type(error).__name__
        if refusal := self._refusal(error, text, doing):
            return refusal
        if (
            not isinstance(error, OSError)
            and type(error).__module__.split(".")[0] not in STORE_MODULES
        ):
            return JobFailed(f"{doing}: {type(error).__name__}: {text}")
        where = mask_secrets(self.tracking_uri)
        if self.registry_uri != self.tracking_uri:
            where += f" or {mask_secrets(self.registry_uri)}"
        return Unreachable(f"{doing}: no answer from {where} ({text})", self._next_step())

    def _refusal(self, error: Exception, text: str, doing: str) -> BadInput | None:
        """Return an error that a person has to fix; None for one that may pass by itself."""
        where, code = mask_secrets(self.tracking_uri), getattr(error, "error_code", None)
        if isinstance(error, ModuleNotFoundError):
            return BadInput(f"{where} needs a driver: {text}", f"pip install {error.name}")
        # SQLAlchemy raises this for a driver that it does not know.
        if type(error).__name__ == "NoSuchModuleError":
            return BadInput(f"{where} names an unknown driver: {text}", "write postgresql://...")
        if found := OTHER_SCHEMA.search(text):
            if known_schema(found[1]):
                return BadInput(f"{doing}: {text}", f"mlflow db upgrade {where}, after a backup")
            return BadInput(
                f"{doing}: {where} was made by a newer MLflow than the one here "
                f"(schema {found[1]})",
                "pip install --upgrade mlflow, or use another database",
            )
        if READ_ONLY.search(text):
            hint = "ask whoever runs it for the right to write; nothing was changed"
            return BadInput(f"{doing}: {where} may only be read ({text})", hint)
        if LOGIN.search(text) or code in ("PERMISSION_DENIED", "UNAUTHENTICATED"):
            hint = (
                "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or ask for the "
                "permission"
            )
            return BadInput(f"{doing}: {where} does not let this login do that ({text})", hint)
        return BadInput(f"{doing}: {text}") if code in REFUSALS else None

    def _next_step(self) -> str:
        elsewhere = f"or unset MLFLOW_TRACKING_URI to use {DEFAULT_URI} in the working directory"
        if self.tracking_uri.startswith(SERVERS):
            return (
                "start it with: mlflow server --host 127.0.0.1 --port 5000, check the address, "
                f"{elsewhere}"
            )
        if file := sqlite_file(self.tracking_uri):
            return f"check that {file} is an MLflow database and that its folder is writable"
        return f"check that the database runs and that the user may log in, {elsewhere}"

    def _connect(self) -> MlflowClient:
        mlflow = import_mlflow()
        # When several processes open an empty database at once, all of them try to create the
        # schema and all but one fail.
        with self._schema_alone():
            client: MlflowClient = mlflow.MlflowClient(self.tracking_uri, self.registry_uri)
            client.search_experiments(max_results=1)
        return client

    def _schema_alone(self) -> AbstractContextManager[None]:
        if file := sqlite_file(self.tracking_uri):
            return schema_lock(file)
        return (
            advisory_lock(self.tracking_uri)
            if self.tracking_uri.startswith("postgresql")
            else nullcontext()
        )


def normalised(uri: str) -> str:
    """Check an address and return it, with an SQLite path made absolute.

    Raises BadInput for an address that can't hold a registry.
    """
    scheme, divider, rest = uri.partition(":")
    backend = scheme.split("+")[0]
    if not divider or backend == "file":
        raise BadInput(
            f"tracking URI {mask_secrets(uri)!r} is a folder: MLflow's file store is retired and "
            "refuses to start",
            f"use {DEFAULT_URI}; mlflow migrate-filestore moves an old ./mlruns into it",
        )
    if backend not in SERVERS + DATABASES or not rest.startswith("//"):
        allowed = ", ".join(f"{name}://" for name in SERVERS + DATABASES)
        raise BadInput(
            f"tracking URI {mask_secrets(uri)!r} is not one of {allowed}",
            f"{DEFAULT_URI} needs no server",
        )
    if backend != "sqlite":
        return _with_a_valid_port(uri).rstrip("/")
    path, query, options = rest.removeprefix("///").partition("?")
    shown = mask_secrets(uri)
    if not rest.startswith("///") or path in ("", ":memory:") or path.startswith("file:"):
        raise BadInput(
            f"tracking URI {mask_secrets(uri)!r} names no file; an SQLite store must be one",
            f"use {DEFAULT_URI}",
        )
    if query and not SQLITE_OPTIONS.fullmatch(options):
        raise BadInput(
            f"tracking URI {shown!r}: the file's name ends at the question mark, and {options!r} "
            "is no option",
            "write a question mark of the path as %3F",
        )
    return f"{scheme}:///{quoted_path(os.path.abspath(unquote(path)))}{query}{options}"


def quoted_path(path: str) -> str:
    """Quote an SQLite file's path for an address.

    SQLAlchemy ends the path at ``?`` and unquotes the rest. From the first folder that needs
    quoting, the slashes are quoted too. MLflow creates the database's parent folder from the
    address without unquoting it; with quoted slashes, that parent is a folder that exists.
    """
    folders = path.split("/")
    quoted = [
        re.sub(r"%(?=[0-9A-Fa-f]{2})", "%25", folder).replace("?", "%3F") for folder in folders
    ]
    plain = 0
    while plain < len(folders) and quoted[plain] == folders[plain]:
        plain += 1
    if plain == len(folders):
        return path
    return "/".join([*quoted[:plain], "%2F".join(quoted[plain:])])


def artifact_location(folder: Path) -> str:
    """Write a folder as MLflow's artifact location.

    The location is a plain path, or a file: address where MLflow would misread the plain path.
    """
    path = str(folder)
    return folder.as_uri() if unquote(path) != path or set("?#;") & set(path) else path


def _with_a_valid_port(uri: str) -> str:
    try:
        _ = urlsplit(uri).port
    except ValueError:  # not chained: the error's text may contain part of the password
        hint = "write http://host:port or scheme://user@host/database"
        raise BadInput(
            f"tracking URI {mask_secrets(uri)!r}: the port is not a number up to 65535", hint
        ) from None
    return uri


def sqlite_file(uri: str) -> Path | None:
    """Return the database file of a normalised SQLite address; None for other addresses."""
    return (
        Path(unquote(uri.partition(":///")[2].partition("?")[0]))
        if uri.startswith("sqlite")
        else None
    )


def first_lines(text: str) -> str:
    """Return an error's own words, without SQLAlchemy's statement, parameters and link."""
    return " ".join(re.split(r"\n\s*\[SQL|\n\(Background", text)[0].split())[:500]


def import_mlflow() -> Any:
    """Import mlflow with our defaults in the environment and its logs quiet.

    The first import takes 1.5 s.
    """
    set_defaults()
    with uncollected():
        import mlflow

    quiet_loggers()
    return mlflow


@contextmanager
def schema_lock(file: Path) -> Iterator[None]:
    """Keep other processes out while this one creates an SQLite schema.

    The lock file is created before the database and removed once the schema is complete. A database
    without a lock file is therefore ready.
    """
    lock_file = file.with_name(f".{file.name}.lock")
    if file.exists() and file.stat().st_size and not lock_file.exists():
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock_file, timeout=LOCK_SECONDS):
            yield
            with suppress(OSError):
                lock_file.unlink()
    except LockTimeout:
        raise Unreachable(
            f"another process has been creating {file} for {LOCK_SECONDS:.0f} s",
            f"end that process, or delete {lock_file} when there is none",
        ) from None


@contextmanager
def advisory_lock(uri: str) -> Iterator[None]:
    """Keep other processes out while this one creates a PostgreSQL schema.

    PostgreSQL releases the lock when the transaction or its connection ends, however it ends.
    """
    from sqlalchemy import create_engine, text

    engine = create_engine(uri)
    try:
        # The lock belongs to the transaction, so that a connection pooler does no harm.
        with engine.begin() as transaction:
            transaction.execute(
                text("SELECT pg_advisory_xact_lock(:number)"), {"number": SCHEMA_LOCK}
            )
            yield
    finally:
        engine.dispose()


def within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return the call's result, or raise TimeoutError after ``seconds``.

    Neither MLflow nor the database drivers accept a deadline for a whole call.
    """
    box: queue.SimpleQueue[tuple[Result | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            box.put((call(), None))
        except BaseException as error:
            box.put((None, error))

    threading.Thread(target=work, name="mlflow-check", daemon=True).start()
    try:
        result, error = box.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None
    if error is not None:
        raise error
    return result  # type: ignore[return-value]  # None only if the call returned None
