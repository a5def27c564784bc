"""deploy/cluster: files for Ray's cluster launcher, checked with the launcher's own code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.manifests import DEPLOY, check_ray_command, version

FILES = sorted((DEPLOY / "cluster").glob("*.yaml"))


def prepared(file: Path) -> dict[str, Any]:
    """Prepare a config as ``ray up`` does before it asks for a machine: fill in the defaults."""
    config = prepare_config(yaml.safe_load(file.read_text()))
    config.setdefault("cluster_synced_files", [])
    return dict(config)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_ray_takes_the_file(file: Path) -> None:
    """With its defaults filled in, the file fits Ray's schema, which refuses unknown keys."""
    config = prepared(file)
    validate_config(config)
    with pytest.raises(jsonschema.ValidationError):
        validate_config(config | {"max_worker": 1})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_clusters_are_closed(file: Path) -> None:
    """Every node uses token authentication, and the dashboard listens on loopback.

    The token comes from the file that the docs create.
    """
    config = prepared(file)
    text = file.read_text()
    assert "RAY_AUTH_MODE=token" in text
    assert any(source == "~/.ray/auth_token" for source in config["file_mounts"].values())
    head = next(command for command in config["head_start_ray_commands"] if "--head" in command)
    assert {"--num-cpus=0", "--dashboard-host=127.0.0.1", "--port=6379"} <= set(
        shlex.split(head.replace(";", " ; "))
    )
    assert all(
        "--address=$RAY_HEAD_IP:6379" in it
        for it in config["worker_start_ray_commands"]
        if "ray start" in it
    )
    for command in [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]:
        check_ray_command(
            shlex.split(re.sub(r"^(ulimit [^;]*; )?(cd \S+ && )?(\w+=\S+ )*", "", command))
        )


def test_the_cloud_s_nodes_have_work_for_gpus_only() -> None:
    """The head offers no CPUs, a GPU node is there from the start, and images are ours."""
    config = prepared(DEPLOY / "cluster" / "aws.yaml")
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert types["gpu"]["min_workers"] >= 1 and types["gpu-spot"]["min_workers"] == 0
    assert all(it["max_workers"] <= config["max_workers"] for it in types.values())
    assert config["docker"]["image"] == f"prompt-orchestrator:{version()}-cuda"
    for kind in types.values():
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
        assert all(disk["Ebs"]["Encrypted"] for disk in kind["node_config"]["BlockDeviceMappings"])
