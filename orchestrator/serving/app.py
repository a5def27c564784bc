"""The serving application on Ray Serve: checks, deployment and the wait until it answers.

Each replica is a complete server with its own store, engine and routes. Ray Serve starts, watches,
restarts and scales the replicas and distributes requests among them. This is the only module of the
package that imports Ray.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from orchestrator.artifact import BaseModelRecord, read_manifest
from orchestrator.cluster.ray_folder import ray_temp_dir
from orchestrator.cluster.ray_internals.core import no_signal_handlers
from orchestrator.cluster.ray_internals.settings import SERVING, quiet_serve_logger, set_defaults
from orchestrator.cluster.session import leave_ray
from orchestrator.errors import BadInput, JobFailed, OrchestratorError, Unreachable
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.source import resolve_model
from orchestrator.registry import CHAMPION, Registry
from orchestrator.registry.versions.refs import ModelRef, parse_ref, printable, suggestion
from orchestrator.serving.deploy.options import ServeOptions, options_from
from orchestrator.serving.deploy.replica import Front, Replica
from orchestrator.serving.http.access import KEYS_VARIABLE, ApiKey, is_loopback, load_keys
from orchestrator.serving.http.tracing import asked_exporter
from orchestrator.serving.prompts.store import RegistrySource
from orchestrator.utils.interrupts import sigterm_kept
from orchestrator.utils.text import first_line, mask_secrets

if TYPE_CHECKING:
    from fastapi import FastAPI
    from ray.serve.schema import ApplicationStatusOverview
    from starlette.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger(__name__)

APP_NAME = "orchestrator"
START_SECONDS = 600.0  # loading a large base model can take minutes
HEALTH_SECONDS = 60.0
HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
"""Ray Serve's environment variable that puts HAProxy in front of the replicas."""
NEXT = "next: "
"""The prefix of the hint line in this project's error messages."""
NEXT_STEP = "orchestrator run JOB registers one; orchestrator init writes a JOB to start from"


DEPLOYMENT: dict[str, Any] = {
    # Above the engine's own limit, so that the engine refuses first: its 429 has OpenAI's format.
    "max_ongoing_requests": 4096,
    "max_queued_requests": 1024,  # applies while no replica is up
    "backpressure_config": {"status_code": 429, "retry_after_s": 1},
    "health_check_period_s": 5,
    # A replica that failed to start would fail again, and the waiting user should see the reason.
    "max_constructor_retry_count": 1,
}


@serve.deployment(name="prompts", **DEPLOYMENT)
@serve.ingress()
class PromptReplica(Replica):
    """A replica that answers HTTP requests directly."""

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.api


@serve.deployment(name="prompts", **DEPLOYMENT)
class HiddenReplica(Replica):
    """A replica that receives its requests from ``FrontReplica``."""


@serve.deployment(name="front", **DEPLOYMENT)
@serve.ingress()
class FrontReplica(Front):
    """The HTTP front that passes requests on to ``HiddenReplica`` and retries them."""

    def __init__(
        self, replicas: DeploymentHandle, keys: tuple[ApiKey, ...], max_body_bytes: int
    ) -> None:
        answer = replicas.options(stream=True).answer.remote
        super().__init__(answer, keys, max_body_bytes, RayActorError, BackPressureError)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        async def front(scope: Scope, receive: Receive, send: Send) -> None:
            await self.pass_on(scope, receive, send)

        return front  # Serve would take a bound method for an ASGI 2 application


@dataclass(frozen=True)
class Server:
    """A running server; ``close`` stops it, and stops Ray too if ``start`` started Ray."""

    url: str
    base_model: str
    owns_ray: bool

    def wait(self) -> None:
        """Block until the application ends or the caller is interrupted.

        Raises JobFailed when the application ended by itself.
        """
        while True:
            time.sleep(2)
            status = serve.status().applications.get(APP_NAME)
            if status is None or status.status in ("DEPLOY_FAILED", "DELETING"):
                raise JobFailed(
                    "the serving application has ended", "look for the reason in Ray's logs"
                )

    def close(self) -> None:
        """Let running requests finish, then stop the application, and Serve or Ray if unused."""
        with suppress(RayServeException, RayActorError):  # Serve never came up, or is gone already
            serve.delete(APP_NAME)  # waits for running requests to finish
            # Shutting Serve down frees the port. A Ray that this process started ends below anyway,
            # and shutting Serve down first would make Ray complain about an interrupted task.
            if not self.owns_ray and not serve.status().applications:
                serve.shutdown()
        if self.owns_ray:
            leave_ray()


def build_app(
    options: ServeOptions, base: BaseModelSpec | None = None, source: RegistrySource | None = None
) -> serve.Application:
    """Build the application for ``serve.run``; the registry supplies ``base`` unless it is given.

    Raises BadInput for options that can't work, and whenever ``choose_base_model`` does.
    """
    options.check()
    keys = load_keys()
    check_haproxy(keys)
    source = source or Registry(options.tracking_uri, options.registry_uri)
    base = base or choose_base_model(options, source)
    arguments = (options, base, source, keys)
    replica_options = {
        **_scaling(options),
        "graceful_shutdown_timeout_s": options.drain_seconds,
        "ray_actor_options": {"num_cpus": options.cores, "num_gpus": options.gpus or 0},
    }
    if not options.retry_dead:
        return PromptReplica.options(**replica_options).bind(*arguments)  # type: ignore[attr-defined]
    replicas = HiddenReplica.options(**replica_options).bind(*arguments)  # type: ignore[attr-defined]
    front = FrontReplica.options(ray_actor_options={"num_cpus": 0})  # type: ignore[attr-defined]
    return front.bind(replicas, keys, options.request_limits.max_body_bytes)


def _scaling(options: ServeOptions) -> dict[str, Any]:
    if options.max_replicas is None:
        return {"num_replicas": options.replicas}
    autoscaling = {
        "min_replicas": options.replicas,
        # Start at least one replica, so that a failure to load the model shows at once.
        "initial_replicas": max(1, options.replicas),
        "max_replicas": options.max_replicas,
        "target_ongoing_requests": options.target_ongoing,
        "upscale_delay_s": options.upscale_seconds,
        "downscale_delay_s": options.downscale_seconds,
        "metrics_interval_s": 1,
        "look_back_period_s": 5,
    }
    return {"autoscaling_config": autoscaling}


def application(args: Mapping[str, Any]) -> serve.Application:
    """Build the application from the ``args`` of a Serve config file.

    The config file names this function: ``import_path: orchestrator.serving.app:application``.
    """
    return build_app(options_from(args))


def start(options: ServeOptions, source: RegistrySource | None = None) -> Server:
    """Check the options, start Ray and Serve as needed, and return once requests are answered.

    Raises BadInput for options that can't work, Unreachable for a registry or cluster that does not
    answer or for a port in use, and JobFailed when the application does not start.
    """
    options.check()
    check_address(options)
    check_haproxy(load_keys())
    check_cores(options)
    asked_exporter()
    source = source or Registry(options.tracking_uri, options.registry_uri)
    base = choose_base_model(options, source)
    resolve_model(base, weights=False)
    owns_ray = _connect_ray(options)
    server = Server(options.url, base.id, owns_ray)
    try:
        options = _with_devices(options, owns_ray)
        _deploy(options, build_app(options, base, source))
        _await_running()
        _await_health(options)
    except BaseException:
        server.close()
        raise
    return server


def serve_forever(options: ServeOptions, source: RegistrySource | None = None) -> None:
    """Serve until interrupted."""
    server = start(options, source)
    try:
        server.wait()
    finally:
        server.close()


def check_address(options: ServeOptions) -> None:
    """Check that the address is free and protected.

    Raises BadInput for an address that other machines can reach when there are no API keys, and
    Unreachable for a port that can't be used.
    """
    if not is_loopback(options.host) and not load_keys():
        raise BadInput(
            f"--host {options.host} can be reached from other machines, and there are no API keys",
            f"set {KEYS_VARIABLE} to one key or several, separated by commas, "
            "or serve on 127.0.0.1",
        )
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((options.host.strip("[]"), options.port))
        except OSError as error:
            raise Unreachable(
                f"port {options.port} on {options.host} can't be used: {error.strerror}",
                "stop the server that holds it, or choose another with --port",
            ) from None


def check_haproxy(keys: Sequence[ApiKey]) -> None:
    """Raise BadInput when Serve uses HAProxy and there are no API keys.

    With HAProxy the replicas listen on all interfaces, and they can't see a client's address, so
    the check that admits only local clients can't work.
    """
    if os.environ.get(HAPROXY) == "1" and not keys:
        raise BadInput(
            f"{HAPROXY}=1 lets other machines reach the replicas, and there are no API keys",
            f"set {KEYS_VARIABLE} to one key or several, separated by commas, "
            "or serve without HAProxy",
        )


def check_cores(options: ServeOptions) -> None:
    """Raise BadInput when the replicas need more cores than this machine has.

    Only checked when Ray is going to be started on this machine, where Serve would wait in vain for
    the missing cores. A cluster may grow.
    """
    needed, available = options.cores * max(1, options.replicas), os.cpu_count() or 1
    if not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")) and needed > available:
        raise BadInput(
            f"the replicas need {needed} cores, this machine has {available}",
            "lower --cpus or --replicas",
        )


def choose_base_model(options: ServeOptions, source: RegistrySource) -> BaseModelSpec:
    """Return the base model that all prompts to be served share, or the one that the options name.

    Raises BadInput when there is no prompt to serve or when prompts have different base models.
    """
    if options.base_model is not None:
        return BaseModelSpec.model_validate(
            {"id": options.base_model, "revision": options.revision, "dtype": options.dtype}
        )
    records = dict(_base_models(options, source))
    fingerprints = {record.fingerprint for record in records.values()}
    if len(fingerprints) > 1:
        base_models = "; ".join(f"{name} on {record.id}" for name, record in records.items())
        raise BadInput(
            f"these prompts were tuned on different base models: {base_models}",
            "name those of one base model",
        )
    record = next(iter(records.values()))
    base_model = {"id": record.id, "revision": record.revision, "quantization": record.quantization}
    return BaseModelSpec.model_validate({**base_model, "dtype": options.dtype})


def _base_models(
    options: ServeOptions, source: RegistrySource
) -> Iterator[tuple[str, BaseModelRecord]]:
    """Yield each prompt to be served and the base model that it was tuned on.

    Raises BadInput for a prompt that the options name and that can't be read. Without named
    prompts, unreadable versions are left out with a warning; BadInput is raised if none is left.
    """
    snapshot = {name: model.aliases for name, model in source.live().items()}
    refs = [parse_ref(text) for text in options.models] or [
        ModelRef(name) for name in sorted(snapshot)
    ]
    any_readable = False
    problem: OrchestratorError | None = None
    for ref in refs:
        try:
            version = _version(ref, snapshot)
            yield str(ref), read_manifest(source.fetch(ref.name, version)).base_model
            any_readable = True
        except BadInput as error:
            if options.models:
                raise
            log.warning("%s is not served: %s", ref, error.message)
            problem = error
    if not any_readable:
        raise problem or BadInput("no prompt is registered yet", NEXT_STEP)


def _version(ref: ModelRef, snapshot: Mapping[str, Mapping[str, int]]) -> int:
    if ref.name not in snapshot:
        raise BadInput(
            f"no registered prompt {printable(ref.name)!r}",
            suggestion(ref.name, snapshot) or NEXT_STEP,
        )
    if ref.version is not None:
        return ref.version
    aliases = snapshot[ref.name]
    if ref.alias is None and CHAMPION not in aliases and aliases:
        return next(iter(aliases.values()))  # no champion yet, but other aliases are served
    if (ref.alias or CHAMPION) not in aliases:
        raise BadInput(
            f"{printable(ref.name)} has no alias {ref.alias or CHAMPION!r}",
            suggestion(ref.alias or CHAMPION, aliases)
            or f"orchestrator promote {ref.name} VERSION",
        )
    return aliases[ref.alias or CHAMPION]


def _connect_ray(options: ServeOptions) -> bool:
    """Connect to the cluster at RAY_ADDRESS, or start Ray here; return whether Ray was started.

    Raises Unreachable when the cluster does not answer or Ray can't be started.
    """
    if ray.is_initialized():
        return False
    set_defaults(SERVING)
    address = os.environ.get("RAY_ADDRESS")
    try:
        with sigterm_kept(), no_signal_handlers():
            ray.init(
                # "local" starts a new Ray. The default would join any Ray that already runs on
                # this machine, which belongs to somebody else.
                address=address or "local",
                namespace=APP_NAME,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                configure_logging=True,
                _temp_dir=None if address else ray_temp_dir(),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        problem = "Ray can't be started on this machine"
        if address:
            problem = f"no Ray cluster answers at {mask_secrets(address)}"
        raise Unreachable(f"{problem}: {first_line(error)}", "orchestrator doctor") from None
    return not address


def _with_devices(options: ServeOptions, on_this_machine: bool) -> ServeOptions:
    """Check the number of GPUs per replica, or choose it when the options leave it open.

    ``on_this_machine`` says that Ray was started on this machine alone. Its GPUs then count only if
    this machine's torch can use them. Raises BadInput when this machine has too few.
    """
    if options.gpus is not None:
        needed = options.gpus * max(1, options.replicas)
        if on_this_machine and needed > _gpus():
            raise BadInput(
                f"the replicas need {needed:g} GPU{'' if needed == 1 else 's'}, "
                f"this machine has {_gpus():g}",
                "lower --gpus or --replicas; --gpus 0 computes on CPUs",
            )
        return options
    usable = _gpus() if not on_this_machine or torch.cuda.is_available() else 0
    return replace(options, gpus=1.0 if usable >= max(1, options.replicas) else 0.0)


def _gpus() -> float:
    """Return the number of GPUs that Ray counts in the cluster."""
    return float(ray.cluster_resources().get("GPU", 0))


def _deploy(options: ServeOptions, app: serve.Application) -> None:
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    quiet_serve_logger()
    http = HTTPOptions(
        host=options.host,
        port=options.port,
        # Longer than the replicas' own time limit, so that they answer first, in OpenAI's format.
        request_timeout_s=options.request_limits.seconds + START_SECONDS,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )
    serve.start(proxy_location="EveryNode", http_options=http, logging_config=quiet)
    target = serve.RunTarget(target=app, name=APP_NAME, route_prefix="/", logging_config=quiet)
    serve.run_many([target], wait_for_applications_running=False)


def _await_running() -> None:
    """Block until the replicas are up.

    Raises JobFailed with a replica's own error, or Unreachable when the cluster has no free cores.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        state = serve.status().applications[APP_NAME]
        if state.status == "RUNNING":
            return
        if state.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reason, hint = _reason(state)
            raise JobFailed(
                f"the serving application did not start: {reason}",
                hint or "look for the reason in Ray's logs",
            )
        time.sleep(0.1)
    raise Unreachable(
        f"no replica came up within {START_SECONDS:.0f} s: {_reason(state)[0]}",
        "free cores on the cluster, or add a node",
    )


def _reason(state: ApplicationStatusOverview) -> tuple[str, str]:
    """Return a deployment's error message and its hint, which may be empty.

    Serve reports a whole traceback. Its last line without indentation names the error, and in this
    project's errors the line below holds the hint.
    """
    deployment_messages = (deployment.message for deployment in state.deployments.values())
    message = next(filter(None, deployment_messages), state.message)
    lines = message.splitlines()
    at_margin = [number for number, line in enumerate(lines) if line and not line[0].isspace()]
    if not at_margin:
        return str(state.status.value), ""
    error, *hint_lines = lines[at_margin[-1] :]
    hint = next((line.strip() for line in hint_lines), "")
    if not hint.startswith(NEXT):
        hint = ""
    return re.sub(r"^orchestrator\.errors\.\w+: ", "", error), hint.removeprefix(NEXT)


def _await_health(options: ServeOptions) -> None:
    """Block until /health answers at the address in the options; Unreachable if it does not."""
    deadline = time.monotonic() + HEALTH_SECONDS
    while time.monotonic() < deadline:
        try:
            # No need to verify the certificate's name: this is the server that was just started.
            context = ssl._create_unverified_context() if options.tls_cert else None
            with urllib.request.urlopen(
                f"{options.url}/health", timeout=HEALTH_SECONDS, context=context
            ) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise Unreachable(
        f"{options.url} does not answer", "Serve may already run on this cluster with another port"
    )
