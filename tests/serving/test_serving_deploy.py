"""The files in deploy/ for serving, and the options behind them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from orchestrator.errors import BadInput
from orchestrator.serving.app import build_app
from orchestrator.serving.deploy.options import ServeOptions, options_from
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService

DEPLOY = Path(__file__).parents[2] / "deploy"


def test_the_serve_file_is_one_that_serve_and_we_accept(registry: Any) -> None:
    """Serve's schema accepts the file, our options its args, and an application is built."""
    document = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    schema = ServeDeploySchema.model_validate(document)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "orchestrator.serving.app:application"
    options = options_from(application.args)
    assert (options.replicas, options.max_replicas, options.retry_dead) == (1, 3, True)
    assert build_app(options, source=registry)


def test_unknown_args_are_refused() -> None:
    """The hint lists the arguments that exist."""
    with pytest.raises(BadInput, match="no 'replica'") as refused:
        options_from({"replica": 1})
    assert "replicas" in refused.value.hint


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 2, "max_replicas": 1}, "below"),
        ({"replicas": 0}, "leaves no replica"),
        ({"tls_cert": "a.pem"}, "certificate and its key"),
        ({"gpus": 2}, "computes on one GPU"),
    ],
)
def test_options_that_contradict_each_other(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ServeOptions(**given).check()


def test_addresses() -> None:
    """The address is one that clients can use, even if the server listens everywhere."""
    assert (
        ServeOptions(host="0.0.0.0", port=1, tls_cert="c", tls_key="k").url == "https://127.0.0.1:1"
    )
    assert ServeOptions(host="::1").url == "http://[::1]:8000"


def test_the_dashboard_asks_for_metrics_that_there_are(service: PromptService) -> None:
    """Every metric that a panel names is one that a replica exports."""
    document = json.loads(
        (DEPLOY / "kubernetes" / "monitoring" / "grafana-serving.json").read_text()
    )
    asked = {
        name
        for panel in document["panels"]
        for target in panel["targets"]
        for name in re.findall(r"orchestrator_\w+", target["expr"])
    }
    make_api(service)  # adds the metrics of the store and the engine
    told = set(re.findall(r"^# TYPE (\w+)", service.metrics.text().decode(), re.MULTILINE))
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} <= told
    assert len(asked) > 10
