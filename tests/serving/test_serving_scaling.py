"""Replicas that scale with the load, and HTTPS, on real Serve with a real registry.

The scaling test prints what it saw.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from load import Load
from ray import serve
from ray_state import eventually
from test_serving_failures import KEY, free_port

from orchestrator.models.backbone import Backbone
from orchestrator.registry import Registry
from orchestrator.serving.app import APP_NAME, Server, start
from orchestrator.serving.deploy.options import ServeOptions

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.timeout(600)]

BODY = {"model": "story", "prompt": "the fox", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def registry(
    tmp_path_factory: pytest.TempPathFactory, backbone: Backbone, write_artifact: Any
) -> Registry:
    folder = tmp_path_factory.mktemp("prompts")
    registry = Registry(f"sqlite:///{folder}/mlflow.db", cache_dir=folder / "cache")
    with registry.start_search("serving", {}, {}) as search:
        artifact = write_artifact(folder / "prompt", backbone, tokens=5, seed=1, template="{text}")
        registry.register(artifact, "story", search.run_id)
    registry.set_alias("story", "champion", 1)
    return registry


@contextmanager
def serving(registry: Registry, **more: Any) -> Iterator[Server]:
    os.environ["ORCHESTRATOR_API_KEYS"] = KEY
    try:
        server = start(
            ServeOptions(port=free_port(), cpus=1, poll_seconds=0.5, drain_seconds=20, **more),
            registry,
        )
    finally:
        del os.environ["ORCHESTRATOR_API_KEYS"]
    try:
        yield server
    finally:
        server.close()


def running() -> int:
    """Count the replicas that answer."""
    deployment = serve.status().applications[APP_NAME].deployments["prompts"]
    return int(deployment.replica_states.get("RUNNING", 0))


class Watch:
    """The number of replicas over time, as changes with seconds from the start."""

    def __init__(self) -> None:
        self.begun = time.monotonic()
        self.changes: list[tuple[float, int]] = []

    def now(self) -> int:
        count = running()
        if not self.changes or self.changes[-1][1] != count:
            self.changes.append((round(time.monotonic() - self.begun, 1), count))
        return count


@pytest.mark.usefixtures("ray_cluster")
def test_one_to_three_to_one_under_load(registry: Registry) -> None:
    """Replicas follow a load that rises and falls, and no request fails while they come or go."""
    with serving(
        registry,
        replicas=1,
        max_replicas=3,
        target_ongoing=2,
        upscale_seconds=1,
        downscale_seconds=3,
    ) as up:
        watch = Watch()
        assert watch.now() == 1
        body = {**BODY, "max_tokens": 100}
        with Load(up.url, KEY, body, clients=12, pause=0.0) as heavy:
            assert eventually(lambda: watch.now() == 3)
            heavy.until(lambda answers: sum(answers.values()) > 50)
        with Load(up.url, KEY, BODY, clients=1, pause=0.2) as light:
            assert eventually(lambda: watch.now() == 1)
            light.until(lambda answers: sum(answers.values()) > 10)
        print(f"\nreplicas: {watch.changes}, answered {len(heavy.answers)} + {len(light.answers)}")
        assert heavy.failed == light.failed == []
        assert len({tuple(texts) for _, texts in heavy.answers}) == 1


@pytest.mark.usefixtures("ray_cluster")
def test_to_none_and_back(registry: Registry) -> None:
    """Without requests no replica runs; the first request starts one and is answered."""
    with serving(
        registry,
        replicas=0,
        max_replicas=1,
        target_ongoing=2,
        upscale_seconds=0,
        downscale_seconds=2,
    ) as up:
        watch = Watch()
        assert eventually(lambda: watch.now() == 0)
        begun = time.monotonic()
        headers = {"Authorization": f"Bearer {KEY}"}
        answer = httpx.post(f"{up.url}/v1/completions", json=BODY, headers=headers, timeout=120)
        assert answer.status_code == 200, answer.text
        print(f"\nfrom no replica: the first answer after {time.monotonic() - begun:.1f} s")
        assert eventually(lambda: watch.now() == 0)
        print(f"replicas: {watch.changes}")


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """Write a self-signed certificate of 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    )
    made = made.serial_number(x509.random_serial_number()).add_extension(address, critical=False)
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(
        now + datetime.timedelta(days=1)
    )
    certificate, private = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(
        made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    form = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    private.write_bytes(key.private_bytes(*form))
    return certificate, private


@pytest.mark.usefixtures("ray_cluster")
def test_https(registry: Registry, tmp_path: Path) -> None:
    """With a certificate the server speaks HTTPS only, and a client can verify it."""
    certificate, private = write_certificate(tmp_path)
    with serving(registry, tls_cert=str(certificate), tls_key=str(private)) as up:
        assert up.url.startswith("https://127.0.0.1:")
        headers = {"Authorization": f"Bearer {KEY}"}
        trusting = ssl.create_default_context(cafile=str(certificate))
        answer = httpx.post(
            f"{up.url}/v1/completions", json=BODY, headers=headers, verify=trusting, timeout=60
        )
        assert answer.status_code == 200, answer.text
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{up.url}/health")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{up.url.replace('https', 'http')}/health")
