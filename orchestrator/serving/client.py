"""A client that sends one input to a running server."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import httpx

from orchestrator.errors import BadInput, JobFailed, Unreachable
from orchestrator.registry.versions.refs import ModelRef, parse_ref
from orchestrator.utils.documents import JsonObject
from orchestrator.utils.text import mask_secrets

TIMEOUT_S = 60.0
START_ONE = "start one with `orchestrator serve`, or name it with --url"


@dataclass(frozen=True)
class QueryAnswer:
    """An answer as text to show, and the whole response as a document."""

    text: str
    document: JsonObject


def ask(url: str, model: str, text: str, key: str | None = None) -> QueryAnswer:
    """Classify ``text``, or complete it if the prompt has no labels.

    For a classification, ``text`` may also be a whole row as a JSON object. Raises BadInput for
    requests that the server refuses, Unreachable when no server answers at ``url``, and JobFailed
    when the server has an error.
    """
    ref = parse_ref(model)
    with _client(url, key) as client:
        entry = _entry(client, url, ref)
        if entry.get("labels") is None:
            body = {"model": str(ref), "prompt": text, "max_tokens": 64, "temperature": 0}
            answer = _post(client, url, "/v1/completions", body)
            return QueryAnswer(answer["choices"][0]["text"].strip(), answer)
        answer = _post(client, url, "/classify", {"model": str(ref), "input": [_row(text)]})
        classification = answer["data"][0]
        prob_of = classification["probs"]
        likeliest_first = sorted(prob_of, key=lambda label: -prob_of[label])
        probs = ", ".join(f"{label} {prob_of[label]:.3f}" for label in likeliest_first)
        return QueryAnswer(f"{classification['label']}   ({probs})", answer)


def _client(url: str, key: str | None) -> httpx.Client:
    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S)
    except httpx.InvalidURL as error:
        raise Unreachable(f"no server answers at {mask_secrets(url)}: {error}", START_ONE) from None
    except UnicodeEncodeError:
        raise BadInput(
            "ORCHESTRATOR_API_KEY holds a character that is not allowed in an HTTP header",
            "copy the key again",
        ) from None


def _row(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    return text


def _entry(client: httpx.Client, url: str, ref: ModelRef) -> JsonObject:
    """Return the model's entry in the server's list.

    For a name that is not listed, returns an entry that makes the caller try /classify, which the
    server answers or refuses.
    """
    listed = _checked(_send(client, url, "GET", "/v1/models")).get("data")
    if not isinstance(listed, list):
        raise Unreachable(f"the server at {mask_secrets(url)} is not an orchestrator's", START_ONE)
    return next(
        (entry for entry in listed if parse_ref(entry["id"]).name == ref.name), {"labels": []}
    )


def _post(client: httpx.Client, url: str, route: str, body: JsonObject) -> JsonObject:
    return _checked(_send(client, url, "POST", route, body))


def _send(
    client: httpx.Client, url: str, method: str, route: str, body: JsonObject | None = None
) -> httpx.Response:
    try:
        return client.request(method, route, json=body)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise Unreachable(
            f"no server answers at {mask_secrets(url)}: {type(error).__name__}", START_ONE
        ) from None


def _checked(response: httpx.Response) -> JsonObject:
    try:
        body = response.json()
    except ValueError:
        body = {}
    if response.is_success:
        return body if isinstance(body, dict) else {}
    error = body.get("error") if isinstance(body, dict) else None
    message = f"the server answered HTTP {response.status_code}"
    if isinstance(error, dict):
        message = str(error.get("message"))
    if response.status_code == 401:
        raise BadInput(message, "set ORCHESTRATOR_API_KEY to a key of the server")
    if response.is_client_error:
        raise BadInput(message, "orchestrator models lists what is registered")
    raise JobFailed(message, "look for the reason in the server's log")
