"""A server whose tokenizer has tokens without an embedding in the base model."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from models import load, model_folder
from transformers import AutoTokenizer

from orchestrator.errors import BadInput
from orchestrator.models.backbone import Backbone
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.prompts.served_prompt import load_prompt
from orchestrator.serving.prompts.store import PromptStore

LABELS = {0: " ham", 1: " spam"}


def grown(folder: Path, **special: str) -> Backbone:
    """Load the tiny model with a token added to its tokenizer.

    The token is ``<url>``, or one of the given special tokens.
    """
    shutil.copytree(model_folder(), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(special) if special else tokenizer.add_tokens(["<url>"])
    chat = "{% for it in messages %}[{{ it.role }}] {{ it.content }}\n{% endfor %}[assistant]"
    tokenizer.chat_template = chat
    tokenizer.save_pretrained(folder)
    return load(folder)


@pytest.fixture
def api(tmp_path: Path, registry: Any, write_artifact: Any) -> Iterator[Any]:
    """The routes, with a prompt that classifies and one that generates."""
    backbone = grown(tmp_path / "model")
    registry.add(
        "spam", 2, write_artifact(tmp_path / "spam-2", backbone, verbalizer=LABELS), "champion"
    )
    registry.add(
        "story", 2, write_artifact(tmp_path / "story-2", backbone, template="{text}"), "champion"
    )
    engine = ServingEngine(backbone)
    store = PromptStore(backbone, registry)
    store.refresh()
    service = PromptService(store, engine)
    yield make_api(service)
    service.close()


def post(api: Any, path: str, body: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, content=json.dumps(body))

    return asyncio.run(ask())


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("path", "key", "body"),
    [
        ("/classify", "input", {"model": "spam", "input": "see <url>"}),
        ("/classify", "input", {"model": "spam", "input": ["the fox", {"text": "<url>"}]}),
        ("/v1/completions", "prompt", {"model": "story", "prompt": "see <url>"}),
        ("/v1/completions", "prompt", {"model": "story", "prompt": "see <url>", "stream": True}),
        ("/v1/chat/completions", "messages", {"model": "story", "messages": user("see <url>")}),
        (
            "/v1/chat/completions",
            "messages",
            {"model": "story", "messages": [*user("<url>"), *user("fox")]},
        ),
    ],
)
def test_a_request_with_a_token_beyond_the_table_is_refused(
    api: Any, path: str, key: str, body: Any
) -> None:
    """The error names the token, its id and the table's size; other requests are answered."""
    answer = post(api, path, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, key, "invalid_value")
    assert (
        "holds token '<url>', id 330" in error["message"]
        and "table has 330 rows" in error["message"]
    )
    plain = json.loads(json.dumps(body).replace("<url>", "a fox"))
    assert post(api, path, plain).status_code == 200


def test_a_prompt_is_not_served_where_its_end_token_has_no_embedding(
    tmp_path: Path, write_artifact: Any
) -> None:
    """The prompt is refused when it is loaded, since every row would need the token."""
    backbone = grown(tmp_path / "model", eos_token="<stop>")
    folder = write_artifact(tmp_path / "prompt", backbone, verbalizer=LABELS)
    with pytest.raises(BadInput, match="every row holds token '<stop>', id 330"):
        load_prompt(backbone, folder, "p", 1)


def test_a_prompt_is_not_served_where_its_answers_have_no_embedding(
    tmp_path: Path, write_artifact: Any
) -> None:
    backbone = grown(tmp_path / "model")
    folder = write_artifact(tmp_path / "prompt", backbone, verbalizer={0: " ham", 1: " <url>"})
    with pytest.raises(BadInput, match="the answer ' <url>' holds token '<url>', id 330"):
        load_prompt(backbone, folder, "p", 1)
