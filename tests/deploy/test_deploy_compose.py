"""deploy/compose: all parts on one machine.

Compose itself reads the file where it is installed; the other tests read it as YAML.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from orchestrator.serving.deploy.options import options_from
from orchestrator.serving.http.access import read_keys
from tests.deploy.manifests import (
    DEPLOY,
    KUBERNETES,
    OURS,
    built,
    check_ray_command,
    found,
    version,
)

FOLDER = DEPLOY / "compose"
FILE = FOLDER / "compose.yaml"


def services() -> dict[str, Any]:
    """Return the services, with the settings that each extends filled in.

    A service's own settings win over those that it extends.
    """
    document = yaml.safe_load(FILE.read_text())["services"]
    for service in document.values():
        if extended := service.pop("extends", None):
            other = yaml.safe_load((FOLDER / extended["file"]).read_text())["services"][
                extended["service"]
            ]
            mine = dict(service)
            service |= (
                other | mine | {"environment": other["environment"] | mine.get("environment", {})}
            )
    return dict(document)


def secrets_in(folder: Path) -> None:
    subprocess.run([KUBERNETES / "secrets", "--compose", folder], check=True, capture_output=True)


def test_compose_takes_the_file(tmp_path: Path) -> None:
    """``docker compose config`` accepts the file, with and without the GPU file."""
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    secrets_in(tmp_path / "made")
    for more in ([], ["--file", FOLDER / "gpu.yaml"]):
        argv = [
            "docker",
            "compose",
            "--env-file",
            tmp_path / "made" / "mlflow.env",
            "--file",
            FILE,
            *more,
            "config",
        ]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr


def test_services_are_whole() -> None:
    """Services are complete and refer only to what exists.

    Each has a versioned image or a build, waits for services of this file, and mounts existing
    volumes, files and secrets.
    """
    document, known = yaml.safe_load(FILE.read_text()), services()
    assert set(known) == {
        "postgres",
        "mlflow",
        "head",
        "worker",
        "serving",
        "prometheus",
        "grafana",
    }
    for name, service in known.items():
        assert "build" in service or service["image"].partition(":")[2] not in ("", "latest"), name
        for other, condition in (service.get("depends_on") or {}).items():
            assert other in known
            assert condition["condition"] != "service_healthy" or "healthcheck" in known[other], (
                other
            )
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (
                source in document["volumes"] if "/" not in source else (FOLDER / source).exists()
            ), volume
        assert set(service.get("secrets", [])) <= document["secrets"].keys()
    for name in ("head", "worker"):
        check_ray_command(known[name]["command"])
    assert known["head"]["image"] == f"{OURS[0]}:{version()}"
    dockerfile = FOLDER / known["head"]["build"]["context"] / known["head"]["build"]["dockerfile"]
    assert dockerfile.resolve() == DEPLOY / "image" / "Dockerfile"
    (changed,) = yaml.safe_load((FOLDER / "gpu.yaml").read_text())["services"]
    assert changed in known


def test_only_this_machine_reaches_it() -> None:
    """Ports are published on loopback only; Ray wants its token and the service its keys."""
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    for name in ("head", "worker", "serving"):
        service = services()[name]
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert (
            service["user"] == "1000:1000"
            and service["read_only"]
            and service["cap_drop"] == ["ALL"]
        )
        for variable, secret in (
            ("RAY_AUTH_TOKEN_PATH", "ray-token"),
            ("ORCHESTRATOR_API_KEYS_FILE", "api-keys"),
        ):
            assert (
                service["environment"][variable] == f"/run/secrets/{secret}"
                and secret in service["secrets"]
            )


def test_secrets_are_files_that_commands_make(tmp_path: Path) -> None:
    """The two commands at the head of the file make all its secrets; git ignores the folder."""
    made = tmp_path / "secrets"
    secrets_in(made)
    assert made.stat().st_mode & 0o077 == 0 and (made / "mlflow.env").stat().st_mode & 0o077 == 0
    by_key = {"keys.json", "metrics"}
    wanted = {Path(it["file"]).name for it in yaml.safe_load(FILE.read_text())["secrets"].values()}
    assert wanted - by_key <= {file.name for file in made.iterdir()}
    head = FILE.read_text().partition("name:")[0]
    assert all(f"deploy/compose/secrets/{name}" in head for name in by_key)
    needed = set(
        re.findall(
            r"\$\{(\w+):\?", FILE.read_text() + (DEPLOY / "mlflow" / "compose.yaml").read_text()
        )
    )
    assert needed == {
        line.partition("=")[0] for line in (made / "mlflow.env").read_text().splitlines()
    }
    again = subprocess.run(
        [KUBERNETES / "secrets", "--compose", made], capture_output=True, text=True
    )
    assert again.returncode == 2, "what is there is not overwritten"
    root = DEPLOY.parent
    if shutil.which("git") and (root / ".git").exists():
        ignored = subprocess.run(
            ["git", "-C", root, "check-ignore", "-q", "deploy/compose/secrets/ray-token"]
        )
        assert ignored.returncode == 0


def test_keys_for_the_service_can_be_made_into_the_folder(tmp_path: Path) -> None:
    """The service reads the key file that the commands at the head of the file write.

    One of the keys is for Prometheus.
    """
    from orchestrator.serving.http.access import add_key

    keys = tmp_path / "keys.json"
    assert add_key(keys, "web") != add_key(keys, "metrics")
    assert [key.name for key in read_keys(keys)] == ["web", "metrics"]


def test_the_service_s_config_differs_where_it_has_to() -> None:
    """The config is deploy/serve.yaml, but reachable from outside and on one replica."""
    document, ours = (
        yaml.safe_load(file.read_text()) for file in (FOLDER / "serve.yaml", DEPLOY / "serve.yaml")
    )
    schema = ServeDeploySchema.model_validate(document)
    assert schema.http_options.host == "0.0.0.0"
    (application,), (own,) = document["applications"], ours["applications"]
    options_from(application["args"]).check()
    sizes = {"replicas", "max_replicas", "cpus", "gpus", "upscale_seconds", "downscale_seconds"}
    assert {k: v for k, v in application["args"].items() if k not in sizes} == {
        k: v for k, v in own["args"].items() if k not in sizes
    }
    assert "/etc/orchestrator/serve.yaml" in services()["serving"]["command"]


def test_images_of_others_have_the_versions_of_the_manifests() -> None:
    """One machine and a cluster run the same Prometheus, Grafana and PostgreSQL."""
    here = {service["image"] for service in services().values() if "image" in service}
    there = set(found(built("overlays/small"), "image"))
    assert {image for image in here if not image.startswith(OURS)} <= there
