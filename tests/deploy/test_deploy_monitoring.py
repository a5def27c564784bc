"""Prometheus and Grafana in deploy/: the metrics, labels and pods that they name exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from orchestrator.serving.http.access import OPEN_PATHS
from orchestrator.serving.http.metrics import Metrics
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.prompts.store import PromptStore
from tests.deploy.manifests import DEPLOY, KUBERNETES, all_pods, built, labels, whole_pods

MONITORING = KUBERNETES / "monitoring"
SCRAPES = (MONITORING / "prometheus.yaml", DEPLOY / "compose" / "prometheus.yaml")


def told() -> dict[str, set[str]]:
    """Map every metric of a replica to its labels."""
    metrics = Metrics()
    store = PromptStore(cast(Any, None), cast(Any, None))
    engine = SimpleNamespace(waiting=0, running=0)
    service = SimpleNamespace(metrics=metrics, store=store, engine=engine, healthy=True)
    make_api(cast(PromptService, service))  # adds the metrics of the store and the engine
    metrics.request("/classify", 200, 0.1, "m")
    metrics.tokens("m", 1, 1)
    metrics.first_token("m", 0.1)
    metrics.batch("classify", 1)
    store.counts.update({("evictions", "m"): 1})
    store._routes[("m", "champion")] = 1
    found: dict[str, set[str]] = {}
    for family in metrics._registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
        found.setdefault(family.name, set())
    found["orchestrator_refused_version"] = {"model", "version"}
    return found


def expressions() -> list[str]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule["expr"] for group in groups for rule in group["rules"]]


def test_alerts_ask_for_metrics_and_labels_that_there_are() -> None:
    """Every metric and every label that an alert rule uses exists."""
    known = told()
    asked = set()
    for expression in expressions():
        assert expression.count("(") == expression.count(")")
        own = re.findall(r"(orchestrator_\w+)(?:\{([^}]*)\})?", expression)
        asked |= {name for name, _ in own}
        for name, chosen in own:
            assert name in known, name
            assert set(re.findall(r"(\w+)\s*[=!]", chosen)) <= known[name], expression
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            assert {it.strip() for it in grouped.split(",")} <= set().union(
                *(known[name] for name, _ in own)
            )
    assert len(asked) >= 5


def test_alerts_lead_to_pages_that_there_are() -> None:
    """Each alert names a page of docs/, has a summary, and waits before it fires."""
    for group in yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert (DEPLOY.parent / rule["annotations"]["page"]).exists() and rule["annotations"][
                "summary"
            ]
            assert rule["labels"]["severity"] in ("page", "ticket") and rule["for"]


@pytest.mark.parametrize("file", SCRAPES, ids=lambda file: file.parent.name)
def test_the_service_is_asked_with_a_key(file: Path) -> None:
    """The service's metrics need a key, which comes from a file; Ray's need none."""
    assert "/metrics" not in OPEN_PATHS
    jobs = {job["job_name"]: job for job in yaml.safe_load(file.read_text())["scrape_configs"]}
    assert set(jobs) == {"ray", "serving"}
    assert jobs["serving"]["authorization"]["credentials_file"].endswith("/metrics")
    assert "authorization" not in jobs["ray"]


def test_prometheus_finds_pods_by_labels_and_ports_that_they_have() -> None:
    """Each job keeps at least one pod of the large overlay.

    It selects pods by their labels and by the name of a port.
    """
    every = [pod for _, pod in whole_pods("large")]
    sanitised = {re.sub(r"\W", "_", name): name for pod in every for name in labels(pod)}
    for job in yaml.safe_load(SCRAPES[0].read_text())["scrape_configs"]:
        matching = every
        for rule in job["relabel_configs"]:
            (source,) = rule["source_labels"]
            label = source.removeprefix("__meta_kubernetes_pod_label_")
            if label != source and label != "ray_io_cluster":  # which KubeRay adds
                assert label in sanitised, label
            if rule.get("action") == "keep" and label != source:
                matching = [
                    pod for pod in matching if labels(pod).get(sanitised[label]) == rule["regex"]
                ]
            elif rule.get("action") == "keep":
                ports = {"__meta_kubernetes_pod_container_port_name": rule["regex"]}[source]
                matching = [
                    pod
                    for pod in matching
                    if any(
                        port["name"] == ports
                        for it in pod["spec"]["containers"]
                        for port in it.get("ports", [])
                    )
                ]
        assert matching, job["job_name"]


def test_grafana_has_the_dashboard_and_its_source() -> None:
    """The build holds the dashboard unchanged, and a data source of the kind it needs."""
    maps = [it for it in built("monitoring") if it["kind"] == "ConfigMap"]
    held = {
        it["metadata"]["name"].rpartition("-")[0]: it["data"] for it in maps
    }  # kustomize adds a digest to each name
    dashboard = (MONITORING / "grafana-serving.json").read_text()
    assert held["grafana-dashboards"] == {"grafana-serving.json": dashboard}
    (source,) = yaml.safe_load(held["grafana-datasources"]["datasource.yaml"])["datasources"]
    services = {it["metadata"]["name"] for it in built("monitoring") if it["kind"] == "Service"}
    assert source["type"] == "prometheus" and source["url"].split("//")[1].split(":")[0] in services
    (provider,) = yaml.safe_load(held["grafana-providers"]["dashboards.yaml"])["providers"]
    mounted = [
        it["mountPath"]
        for _, pod in all_pods("monitoring")
        for c in pod["spec"]["containers"]
        for it in c.get("volumeMounts", [])
    ]
    assert provider["options"]["path"] in mounted


@pytest.mark.parametrize("file", SCRAPES, ids=lambda file: file.parent.name)
def test_prometheus_takes_settings_and_rules(file: Path, tmp_path: Path) -> None:
    """promtool finds no error.

    Some builds lack Kubernetes discovery, so static targets replace it.
    """
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    document = yaml.safe_load(file.read_text())
    document["rule_files"] = [str(MONITORING / "alerts.yaml")]
    for job in document["scrape_configs"]:
        if job.pop("kubernetes_sd_configs", None):
            job["static_configs"] = [{"targets": ["pod:1"]}]
        if "authorization" in job:
            (tmp_path / "key").touch()
            job["authorization"]["credentials_file"] = str(tmp_path / "key")
    checked = tmp_path / "prometheus.yaml"
    checked.write_text(yaml.safe_dump(document))
    done = subprocess.run(
        ["promtool", "check", "config", checked], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "6 rules found" in done.stdout, done.stdout + done.stderr
