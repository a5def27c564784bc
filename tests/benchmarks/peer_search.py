"""A search without this project, in two ways: ``python -m tests.benchmarks.peer_search JSON``.

``recipe``: the documented way. Each Tune trial is a function that calls ``TorchTrainer.fit``; its
worker loads the model and runs the transformers Trainer. There is no scheduler.

``reused``: the same training as a class trainable that keeps the model from trial to trial, with
ASHA.

Both use our trials, initial prompts, rows, steps and cores. As many trials run at once as there are
cores, with one thread each. Neither way writes checkpoints.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

SLIVER = 0.001  # of a CPU, for actors that only wait


@dataclass(frozen=True)
class Asked:
    """Arguments of the program; ``job`` is the document of the job file that our side runs."""

    job: dict[str, Any]
    kind: str
    folder: str = "."
    cores: int = 2


class ReusedTrial(tune.Trainable):
    """Trials trained one after another on one copy of the model."""

    def setup(self, config: dict[str, Any], told: dict[str, Any] | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        assert told is not None
        torch.set_num_threads(1)
        self._told = told
        self._model = (
            AutoModelForCausalLM.from_pretrained(told["model"]).eval().requires_grad_(False)
        )
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        from tests.benchmarks.peer_training import PlainTrial

        self._trial = PlainTrial(
            self._model, self._told["data"], new_config["trial"], self._told["batch"]
        )
        self._best = 0.0
        return True

    def step(self) -> dict[str, Any]:
        self._trial.train(min(self._told["every"], self._told["steps"] - self._trial.step))
        self._best = max(self._best, self._trial.accuracy())
        return {
            "step": self._trial.step,
            "score": self._best,
            "done": self._trial.step >= self._told["steps"],
        }

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Load nothing."""


def recipe_trial(config: dict[str, Any], told: dict[str, Any]) -> None:
    """Train one trial as Ray's guide to tuning with Ray Train does."""
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    name = f"train-{tune.get_context().get_trial_id()}"
    TorchTrainer(
        recipe_worker,
        train_loop_config={"trial": config["trial"], "told": told},
        scaling_config=ray.train.ScalingConfig(
            num_workers=1, resources_per_worker={"CPU": 1 - 2 * SLIVER}
        ),
        torch_config=TorchConfig(backend="gloo"),
        run_config=ray.train.RunConfig(
            name=name, storage_path=told["folder"], callbacks=[TuneReportCallback()]
        ),
    ).fit()


def recipe_worker(config: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train.huggingface.transformers import prepare_trainer
    from transformers import AutoModelForCausalLM

    from tests.benchmarks.peer_training import trainer

    told = config["told"]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(told["model"]).eval()
    best = 0.0

    def report(step: int, accuracy: float) -> None:
        nonlocal best
        best = max(best, accuracy)
        ray.train.report({"step": step, "score": best})

    folder = Path(told["folder"], "trainer")
    setting = {
        "steps": told["steps"],
        "batch": told["batch"],
        "every": told["every"],
        "folder": folder,
    }
    prepare_trainer(trainer(model, told["data"], config["trial"], setting, report)).train()


class Moments(tune.Callback):
    """A callback that records when each report reached the driver."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def on_trial_result(
        self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        number = trial.config["trial"]["number"]
        found = {
            "at": time.time(),
            "trial": f"t{number:03d}",
            "step": result["step"],
            "score": result["score"],
        }
        self.reports.append(found)


def main(asked: Asked) -> None:
    import ray

    from orchestrator.cluster.ray_internals.settings import SEARCH
    from orchestrator.job.yaml import load_job
    from orchestrator.search.prepare import prepare
    from orchestrator.search.study.study import scheduler
    from tests.benchmarks.peer_training import Data, start_ids

    os.environ.update(SEARCH)
    file = Path("job.yaml")
    file.write_text(json.dumps(asked.job))
    prepared = prepare(load_job(file))
    job = prepared.job
    ray.init(
        address="local",
        num_cpus=asked.cores,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    told = {
        "model": job.base_model.id,
        "data": Data.of(prepared.task),
        "steps": job.train.steps,
        "batch": job.train.batch_size,
        "every": job.train.evaluate_every,
        "folder": str(Path(asked.folder).resolve()),
    }
    moments = Moments()
    started = time.time()
    # Imported by name, since Ray would send code of the main module by value.
    here = importlib.import_module("tests.benchmarks.peer_search")
    tokenizer = prepared.task.encoder.tokenizer
    listed = [
        {**spec.config(), "number": number, "start": start_ids(spec, tokenizer)}
        for number, spec in enumerate(prepared.trials)
    ]
    recipe = asked.kind == "recipe"
    trainable = tune.with_resources(
        tune.with_parameters(here.recipe_trial if recipe else here.ReusedTrial, told=told),
        {"CPU": SLIVER if recipe else 1},
    )
    results = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(listed)},
        tune_config=tune.TuneConfig(
            scheduler=None if recipe else scheduler(job),
            max_concurrent_trials=asked.cores,
            reuse_actors=not recipe,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=told["folder"],
            callbacks=[moments],
            verbose=0,
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()
    if results.num_errors:
        raise RuntimeError(f"{results.num_errors} trials failed: {results.errors[0]}")
    found = {"from": started, "to": time.time(), "reports": moments.reports}
    last = {report["trial"]: report["step"] for report in moments.reports}
    found["steps"] = sum(last.values())
    ray.shutdown()
    Path("out.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Asked(**json.loads(sys.argv[1])))
