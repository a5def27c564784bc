"""Ray for the length of a search.

It is a named cluster, or a Ray on this machine that is started and stopped here.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import ray

from orchestrator.cluster.ray_folder import ray_temp_dir
from orchestrator.cluster.ray_internals.core import no_signal_handlers
from orchestrator.cluster.ray_internals.settings import (
    SEARCH,
    preload,
    set_defaults,
    worker_niceness,
)
from orchestrator.cluster.ray_threads import await_ray_threads, names
from orchestrator.errors import BadInput, Unreachable
from orchestrator.utils.garbage import uncollected
from orchestrator.utils.interrupts import sigterm_kept, undisturbed
from orchestrator.utils.text import first_line, mask_secrets

log = logging.getLogger(__name__)

FEW_CORES = 8
"""The most cores on which Ray's processes preload our module.

Ray starts a process for each core. With more cores, most of them would import modules that they
never use.
"""
ANSWER_S = 10.0  # a running cluster connects in milliseconds
FAILURES = (ConnectionError, RuntimeError, ValueError, TimeoutError)  # the errors of ray.init

THREADS_S = 10.0
"""The time to wait for threads that call Ray.

The code that started them has waited for them before, and has ended what they wait for.
"""

_started_here = threading.Event()


def started_here() -> bool:
    """Tell whether ``ray_session`` or ``ray_beside`` started the Ray that this process uses.

    Such a Ray has this process's environment.
    """
    return _started_here.is_set()


@contextmanager
def ray_session(
    address: str | None = None, verbose: bool = False, niceness: int = 0
) -> Iterator[bool]:
    """Connect to ``address``, to RAY_ADDRESS, or to a new local Ray.

    ``niceness`` is that of the processes of a local Ray's workers. A session that is already open
    is used and left open. Yields True if Ray was started here, for this session. Raises Unreachable
    when a named cluster does not answer.
    """
    with ray_beside(address, verbose, niceness=niceness) as up:
        yield up()


@contextmanager
def ray_beside(
    address: str | None = None,
    verbose: bool = False,
    then: Callable[[], None] | None = None,
    niceness: int = 0,
) -> Iterator[Callable[[], bool]]:
    """Open a session as ``ray_session`` does; a local Ray starts while the caller does other work.

    Yields a function that waits until Ray is up and tells whether it was started here. For a named
    cluster, that function connects when it is called.

    Starting Ray means seconds of waiting for its processes. ``then`` is called in the starting
    thread once a local Ray is up, beside the caller's work. On a machine with few cores, each of
    Ray's processes imports the module of ``then`` as it starts. For a named cluster ``then`` is not
    called.
    """
    set_defaults(SEARCH)
    if ray.is_initialized():
        yield lambda: False
        return
    address = address or os.environ.get("RAY_ADDRESS")
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": "INFO" if verbose else "ERROR",
    }
    logging.getLogger("ray").setLevel(options["logging_level"])
    if address:
        try:
            yield partial(_connect, address, options)
        finally:
            with undisturbed():
                leave_ray()
        return
    if then is not None and (os.cpu_count() or 1) <= FEW_CORES:
        preload(then.__module__)
    start = LocalStart(options | {"_temp_dir": ray_temp_dir()}, then, niceness)
    try:
        with undisturbed():
            start.start()
        yield start.up
    finally:
        with undisturbed():
            start.leave()


def _connect(address: str, options: dict[str, Any]) -> bool:
    check_answers(address)
    try:
        with sigterm_kept(), no_signal_handlers():
            ray.init(
                address=address, runtime_env={"env_vars": {"OMP_WAIT_POLICY": "PASSIVE"}}, **options
            )
    except FAILURES as error:
        raise no_cluster(address, first_line(error)) from None
    return False


class LocalStart(threading.Thread):
    """The thread that starts a Ray on this machine and lives as long as that Ray.

    Ray has the system end its processes when the thread that started them ends.
    """

    def __init__(
        self,
        options: dict[str, Any],
        then: Callable[[], None] | None = None,
        niceness: int = 0,
    ) -> None:
        super().__init__(name="ray-start", daemon=True)
        self._options = options
        self._niceness = niceness
        self._then = then
        self._error: Exception | None = None
        self._tried = threading.Event()
        self._idle = threading.Event()
        self._left = threading.Event()

    def run(self) -> None:
        try:
            with no_signal_handlers(), worker_niceness(self._niceness):
                ray.init(address="local", include_dashboard=False, **self._options)
        except Exception as error:
            self._error = error
        else:
            _started_here.set()
        self._tried.set()
        if self._then is not None and self._error is None:
            try:
                self._then()
            except Exception:  # the preparation only makes a search start sooner
                log.info("nothing was made ready in Ray", exc_info=True)
        self._idle.set()
        self._left.wait()

    def up(self) -> bool:
        """Wait until Ray is up; return True, because it was started here.

        Raises Unreachable when Ray does not start.
        """
        self._tried.wait()
        # Ray raises a plain Exception when its processes take longer than 30 s to start.
        if isinstance(self._error, FAILURES) or type(self._error) is Exception:
            raise not_started(first_line(self._error)) from None
        if self._error is not None:
            raise self._error
        return True

    def leave(self) -> None:
        """Shut Ray down, once it has started and this thread has finished its work in it.

        A call to Ray after its shutdown would start another Ray that nothing keeps track of.
        """
        if self.ident is None:  # the thread was not started
            return
        self._idle.wait()
        _started_here.clear()
        leave_ray()
        # Another thread is stuck in a call of Ray. This thread and Ray then live until the
        # process ends.
        if ray.is_initialized():
            return
        self._left.set()
        self.join()


def leave_ray() -> None:
    """Call ``ray.shutdown()`` once no thread calls Ray any more.

    If a thread does not end, Ray is left running for ``end_ray_process``. Garbage collection is off
    during the shutdown: if another thread drops a reference to one of Ray's objects meanwhile,
    Ray's C++ code ends the process with exit code 1.
    """
    if stuck := await_ray_threads(THREADS_S):
        log.warning(
            "Ray is not shut down, because these threads are still inside a call of Ray: %s",
            names(stuck),
        )
        return
    with uncollected():
        ray.shutdown()


def check_answers(address: str) -> None:
    """Raise Unreachable within seconds when no gRPC server answers at HOST:PORT.

    Ray itself would try for two minutes and then end the process. Raises BadInput for the address
    of a dashboard.
    """
    if address.startswith(("http://", "https://")):
        raise BadInput(
            f"{mask_secrets(address)} is a dashboard's address, to which jobs are submitted",
            "orchestrator submit JOB --address URL",
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or "/" in host:
        return  # auto, local, or a form that Ray itself refuses
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise no_cluster(address, getattr(error, "strerror", None) or str(error)) from None
    if os.environ.get("RAY_USE_TLS") == "1":
        return
    import grpc  # type: ignore[import-untyped]

    with grpc.insecure_channel(
        f"{host}:{port}", options=[("grpc.enable_http_proxy", 0)]
    ) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            raise no_cluster(address, "something listens there that is not Ray") from None


def not_started(reason: str) -> Unreachable:
    return Unreachable(
        f"Ray did not start on this machine: {mask_secrets(reason)}",
        "try again when the machine is less busy, or name a running cluster with --address",
    )


def no_cluster(address: str, reason: str) -> Unreachable:
    return Unreachable(
        f"no Ray cluster answers at {mask_secrets(address)}: {mask_secrets(reason)}",
        "check RAY_ADDRESS or --address (ray://HOST:10001 or HOST:6379), or leave it out to run "
        "on this machine",
    )
