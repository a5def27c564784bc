"""Accuracy and cost of each method on a task: prompts, LoRA, adapters, model tuning, prompt design.

Each method has its own search, with the same number of learning rates and seeds. The searches are
then compared as ``orchestrator report`` compares them. A line is the best trial of a search by
validation.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from orchestrator.job.spec import JobSpec
from tests.benchmarks.jobs import random_model, sst2, trec6
from tests.benchmarks.measure import Line

RATES: dict[str, list[float]] = {
    "prompt_tuning": [0.03, 0.1],
    "prefix_tuning": [0.03, 0.1],
    "p_tuning": [0.001, 0.003],
    "lora": [0.003, 0.01],
    "adapter": [0.001, 0.003],
    "model_tuning": [0.0003, 0.001],
    "lomo": [0.03, 0.1],
}
SPACES: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"init": "class_labels", "num_virtual_tokens": 20},
    "prefix_tuning": {"init": "class_labels", "num_virtual_tokens": 20},
    "p_tuning": {"init": "class_labels", "num_virtual_tokens": 20},
    "lora": {"rank": 8},
    "adapter": {"bottleneck": 16},
    "model_tuning": {},
    "lomo": {},
    "prompt_design": {"shots": [1, 4], "demonstrations": ["random", "nearest"]},
}


@dataclass(frozen=True)
class Setting:
    """Data by name, steps of a trial, seeds, and most learning rates of a method."""

    data: dict[str, Callable[[Path], dict[str, Any]]] = field(
        default_factory=lambda: {"sst2": sst2, "trec6": partial(trec6, validation=300, test=500)}
    )
    steps: int = 500
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: int = 2


SETTINGS = {
    "real": Setting(),
    "short": Setting(steps=150, rates=1),
    "small": Setting({"random": random_model}, steps=4, seeds=(0,), rates=1),
}


def job(base: dict[str, Any], method: str, setting: Setting) -> dict[str, Any]:
    """Return the job document of one method."""
    space = {**SPACES[method], "seed": list(setting.seeds)}
    if method in RATES:
        space["learning_rate"] = RATES[method][-setting.rates :]
    document = {
        **base,
        "method": method,
        "search": {"space": space, "searcher": "grid", "scheduler": "fifo", "few_shot": 4},
        # One trial at a time, so that seconds and memory belong to a single trial.
        "resources": {"trials_per_worker": 1},
    }
    if method == "prefix_tuning":
        document["reparameterization"] = {"type": "none"}  # learns faster here than with a network
    if method != "prompt_design":
        every = max(1, setting.steps // 5)
        document["train"] = {"steps": setting.steps, "batch_size": 16, "evaluate_every": every}
    if method == "lomo":
        document["train"].update({"optimizer": "sgd", "clip_norm": 1.0})
    return document


def lines(setting: Setting, only: str = "", out: Path | None = None) -> list[Line]:
    """Return a line for each method on each data set.

    Pages of the comparisons are written to ``out``.
    """
    # Imported here, so that Ray and MLflow are only needed where a search runs.
    from orchestrator.cluster.session import ray_session
    from orchestrator.search.report import comparison, comparison_page, read_facts
    from orchestrator.search.state.saved import find_search

    found: list[Line] = []
    for name, make in setting.data.items():
        chosen = [method for method in SPACES if only in f"{name} {method}"]
        if not chosen:
            continue
        with tempfile.TemporaryDirectory(prefix="methods-") as scratch, _own_store(Path(scratch)):
            base = make(Path(scratch))
            facts = []
            with ray_session():  # shared, since Ray's start is not measured
                for method in chosen:
                    search = _run({**job(base, method, setting), "name": method.replace("_", "-")})
                    facts.append(read_facts(find_search(search)))
                    document = comparison(facts)
                    if out:  # written after each search, in case the run is interrupted
                        (out / f"methods-{name}.html").write_text(comparison_page(document))
                        (out / f"methods-{name}.json").write_text(json.dumps(document, indent=1))
        found += [_bare(name, which, one) for which, one in document["baselines"].items()]
        found += [_line(name, entry) for entry in document["searches"]]
    return found


@contextmanager
def _own_store(folder: Path) -> Iterator[None]:
    """Keep searches and runs in a folder, whatever the environment says."""
    plain = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "ORCHESTRATOR_HOME", "RAY_ADDRESS")
    kept = {name: os.environ.pop(name) for name in plain if name in os.environ}
    try:
        with chdir(folder):
            yield
    finally:
        os.environ.update(kept)


def _run(document: dict[str, Any]) -> str:
    """Run a search and return its id."""
    from rich.console import Console

    from orchestrator.cli.progress import ConsoleProgress
    from orchestrator.search.run import run_job

    spec = JobSpec.model_validate(document)
    found = run_job(spec, ConsoleProgress(spec, Console(stderr=True), quiet=True))
    reached, costs = found["best"]["metrics"], found["costs"]
    print(
        f"{document['method']}: {reached} {costs} {found['seconds']['total']:.0f} s",
        file=sys.stderr,
        flush=True,
    )
    return str(found["search"])


def _bare(data: str, name: str, found: dict[str, Any]) -> Line:
    nothing = {
        "seeds": "",
        "parameters": "0",
        "stored bytes": "",
        "training, s": "",
        "evaluation, s": "",
        "peak, MB": "",
    }
    return Line(
        f"{data}, {name.replace('_', ' ')}", {**_accuracy(found), **nothing}, {"metrics": found}
    )


def _line(data: str, entry: dict[str, Any]) -> Line:
    costs, spread = entry["costs"], entry.get("seeds", {}).get("validation", {}).get("accuracy")
    shown = {
        **_accuracy(entry["metrics"]),
        "seeds": f"{spread['mean']:.3f} ± {spread['std']:.3f}" if spread else "",
        "parameters": str(costs["parameters"]),
        "stored bytes": str(costs["stored_bytes"]),
        "training, s": f"{costs['seconds']:.1f}",
        "evaluation, s": f"{costs['evaluation_seconds']:.2f}",
        "peak, MB": f"{costs['peak_bytes'] / 1e6:.0f}",
    }
    return Line(f"{data}, {entry['method'].replace('_', ' ')}", shown, entry)


def _accuracy(metrics: dict[str, dict[str, float]]) -> dict[str, float | str]:
    return {split: f"{metrics[split]['accuracy']:.3f}" for split in ("validation", "test")}
