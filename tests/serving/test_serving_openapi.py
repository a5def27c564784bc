"""The OpenAPI document, and requests that schemathesis makes from it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from test_serving_api import listen  # noqa: F401
from test_serving_routes import Client

from orchestrator.serving.http.service import PromptService

schemathesis = pytest.importorskip(
    "schemathesis", reason="schemathesis is not installed: make venv"
)


def test_the_document_describes_every_route(service: PromptService) -> None:
    """Bodies and answers of all routes are described, with the models' limits.

    The document itself is not described.
    """
    document = Client(service).get("/openapi.json").json()
    assert set(document["paths"]) == {path for _, path in OPERATIONS}
    body = document["paths"]["/v1/completions"]["post"]["requestBody"]["content"][
        "application/json"
    ]["schema"]
    assert body["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
    assert "$ref" not in str(body)


OPERATIONS = [
    ("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models"), ("GET", "/v1/models/{model}"),
    ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("POST", "/classify"),
    ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/tokenizer_info"),
]  # fmt: skip
MODELS = ["story", "spam", "trec", "spam:1", "none"]


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_keep_to_the_document(
    method: str,
    path: str,
    service: PromptService,
    listen: Any,  # noqa: F811
) -> None:
    """Every answer has a described status and body, and none is a server error.

    Requests fit the document, or do not.
    """
    described = schemathesis.openapi.from_url(f"{listen(service)}/openapi.json")

    @settings(
        max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(case=described[path][method].as_strategy())
    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = MODELS[len(case.body["model"]) % len(MODELS)]
        # A valid body may still be too long for the context or lack a column of the template.
        case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

    ask()
