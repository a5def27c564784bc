"""Servers of the serving benchmark, each started as a process.

They are ours, ours without an engine, and PEFT behind FastAPI with and without batches for each
adapter.
"""

from __future__ import annotations

import orchestrator  # noqa: F401  # before torch: sets how OpenMP threads wait

# isort: split
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request

from orchestrator.artifact import BaseModelRecord, DataRecord, Manifest, PromptArtifact
from orchestrator.registry import LiveModel
from orchestrator.serving.engine.engine import ServingEngine
from orchestrator.serving.engine.generation import Completion, Sampling
from orchestrator.serving.http.routes import make_api
from orchestrator.serving.http.service import PromptService
from orchestrator.serving.prompts.served_prompt import ServedPrompt
from orchestrator.serving.prompts.store import PromptStore
from tests.benchmarks.subjects import CONTEXT, SIZES, backbone_of, make_model, make_tokenizer

MAX_ROWS = 64


def save_prompts(folder: Path, size: str, count: int, length: int) -> list[str]:
    """Save prompts of random numbers as artifacts, one folder each, and return their names."""
    dimensions = SIZES[size]
    record = BaseModelRecord(
        id="bench",
        revision="main",
        model_type="llama",
        fingerprint="",
        hidden_size=dimensions.width,
        vocab_size=dimensions.vocabulary,
        context_length=CONTEXT,
        tokenizer_digest="",
    )
    manifest = Manifest(
        method="prompt_tuning",
        num_virtual_tokens=length,
        config={},
        template="{text}",
        target="text",
        verbalizer=None,
        max_input_tokens=512,
        max_target_tokens=64,
        base_model=record,
        data=DataRecord(path="bench", fingerprint="0", rows={}),
        metrics={},
        baselines={},
        steps=0,
        search="bench",
        trial="0",
        orchestrator_version="0",
    )
    names = [f"prompt-{number}" for number in range(count)]
    for number, name in enumerate(names):
        noise = (
            np.random.default_rng(number)
            .normal(scale=0.5, size=(length, dimensions.width))
            .astype(np.float32)
        )
        PromptArtifact(noise, manifest).save(folder / name)
    return names


class Folders:
    """A registry whose models are the folders in ``root``."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def live(self) -> Mapping[str, LiveModel]:
        return {folder.name: LiveModel({"champion": 1}) for folder in self._root.iterdir()}

    def fetch(self, name: str, version: int) -> Path:
        return self._root / name


class NullEngine(ServingEngine):
    """An engine that answers at once with an empty text."""

    async def complete(
        self, prompt: ServedPrompt, inputs: Sequence[list[int]], sampling: Sampling
    ) -> list[Completion]:
        return [Completion("", "stop", 1)] * len(inputs)


def ours(size: str, folder: Path, engine: type[ServingEngine] = ServingEngine) -> FastAPI:
    torch.manual_seed(0)
    backbone = backbone_of(make_model(SIZES[size], torch.device("cpu")))
    store = PromptStore(backbone, Folders(folder))
    store.refresh()
    return make_api(PromptService(store, engine(backbone)))


class Peer:
    """PEFT's prompts on the same model, used as PEFT documents: set_adapter, then generate."""

    def __init__(self, size: str, folder: Path) -> None:
        from peft import PromptTuningConfig, get_peft_model

        torch.manual_seed(0)
        model = make_model(SIZES[size], torch.device("cpu")).eval()
        self._tokenizer = make_tokenizer(SIZES[size].vocabulary)
        names = sorted(one.name for one in folder.iterdir())
        self._model: Any = None
        for name in names:
            weights = torch.from_numpy(PromptArtifact.load(folder / name).weights)
            config = PromptTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=len(weights), inference_mode=True
            )
            if self._model is None:
                self._model = get_peft_model(model, config, adapter_name=name)
            else:
                self._model.add_adapter(name, config)
            with torch.no_grad():
                self._model.prompt_encoder[name].embedding.weight.copy_(weights)
        self._model.eval()

    @torch.inference_mode()
    def generate(self, name: str, texts: Sequence[str], tokens: int) -> list[str]:
        """Generate texts for inputs of equal length."""
        self._model.set_adapter(name)
        ids = torch.tensor([self._tokenizer(text)["input_ids"] for text in texts])
        made = self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )
        new = made[:, ids.shape[1] :]
        return [str(self._tokenizer.decode(row, skip_special_tokens=True)) for row in new]


def peft(size: str, folder: Path, batched: bool) -> FastAPI:
    """Return an application with one worker, which takes the oldest request.

    With ``batched`` it takes all requests that wait for the same adapter.
    """
    peer, api = Peer(size, folder), FastAPI()
    waiting: list[tuple[dict[str, Any], asyncio.Future[str]]] = []
    arrived = asyncio.Event()

    async def work() -> None:
        while True:
            await arrived.wait()
            arrived.clear()
            while waiting:
                first = waiting[0][0]
                kin = [one for one in waiting if one[0]["model"] == first["model"]]
                taken = kin[:MAX_ROWS] if batched else waiting[:1]
                waiting[:] = [one for one in waiting if not any(one is other for other in taken)]
                texts = [body["prompt"] for body, _ in taken]
                made = await asyncio.to_thread(
                    peer.generate, first["model"], texts, first["max_tokens"]
                )
                for (_, future), text in zip(taken, made, strict=True):
                    future.set_result(text)

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.post("/v1/completions")
    async def complete(request: Request) -> dict[str, Any]:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        waiting.append((await request.json(), future))
        arrived.set()
        return {"choices": [{"text": await future}]}

    api.state.worker = work
    return api


def main(kind: str, size: str, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    if kind in ("ours", "null"):
        api = ours(size, Path(folder), NullEngine if kind == "null" else ServingEngine)
    else:
        api = peft(size, Path(folder), kind == "batched")
    server = uvicorn.Server(uvicorn.Config(api, port=port, log_level="error", lifespan="off"))

    async def serve() -> None:
        worker = asyncio.create_task(api.state.worker()) if kind not in ("ours", "null") else None
        await server.serve()
        if worker:
            worker.cancel()

    asyncio.run(serve())


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
