"""``make bench``: benchmarks of engine, searches and serving.

Tables are printed, and JSON is written to build/bench/.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import orchestrator  # before torch: sets how OpenMP threads wait

# isort: split
import torch

from orchestrator.models.backbone import default_device
from orchestrator.utils.atomic import write_whole
from tests.benchmarks import (
    accelerator,
    chat_model,
    evaluation,
    labels,
    live,
    logs,
    methods,
    nodes,
    overhead,
    paces,
    packing,
    plans,
    population,
    scaling,
    search,
    serving,
    step,
    tables,
    trials,
    whole_model,
)
from tests.benchmarks.measure import Line, Skipped, table
from tests.benchmarks.subjects import TOY

OUT = Path("build/bench")
S = TypeVar("S")


def _step(args: argparse.Namespace) -> list[Line]:
    cases = tuple(case for case in step.CASES if args.only in case.name)
    setting = step.Setting(pairs=args.pairs, cases=cases)
    return step.lines(replace(setting, size=TOY, inputs=5, rows=3) if args.toy else setting)


def _packing(args: argparse.Namespace) -> list[Line]:
    setting = packing.Setting(pairs=args.pairs, size=args.size or "6x192")
    if args.toy:
        setting = replace(setting, size="toy", trials=(1, 2), rows=(2,))
    parts = {"speed": packing.speed_lines, "memory": packing.memory_lines}
    return [line for name, lines in parts.items() if args.only in name for line in lines(setting)]


def _overhead(args: argparse.Namespace) -> list[Line]:
    setting = overhead.Setting(sizes=(args.size,)) if args.size else overhead.Setting()
    return overhead.lines(replace(setting, sizes=("toy",)) if args.toy else setting)


def _evaluation(args: argparse.Namespace) -> list[Line]:
    setting = evaluation.Setting(pairs=args.pairs, size=args.size or "6x192")
    return evaluation.lines(
        replace(setting, size="toy", prompts=(2,), rows=4, answers=(2,)) if args.toy else setting
    )


def _labels(args: argparse.Namespace) -> list[Line]:
    return labels.lines(_of_size(args, labels.SETTINGS), args.pairs, args.only)


def _accelerator(args: argparse.Namespace) -> list[Line]:
    if args.toy:
        toy = accelerator.Setting(
            default_device(), args.peak or 1.0, ("toy",), (1, 2), rows=2, pairs=args.pairs
        )
        return accelerator.lines(toy)
    setting = accelerator.accelerator(args.peak)
    return accelerator.lines(replace(setting, sizes=(args.size,)) if args.size else setting)


def _logging(args: argparse.Namespace) -> list[Line]:
    setting = logs.Setting(pairs=args.pairs, size=args.size or "6x192")
    toy = replace(setting, size="toy", steps=3, models=20, versions=2)
    parts = {"search": logs.search_lines, "listing": logs.listing_lines}
    chosen = toy if args.toy else setting
    return [line for name, lines in parts.items() if args.only in name for line in lines(chosen)]


def _search(args: argparse.Namespace) -> list[Line]:
    setting = _of_size(args, search.SETTINGS)
    setting = replace(setting, seeds=tuple(range(args.seeds))) if args.seeds else setting
    return search.lines(setting, args.only)


def _trials(args: argparse.Namespace) -> list[Line]:
    return trials.lines(_of_size(args, trials.SETTINGS), args.only)


def _nodes(args: argparse.Namespace) -> list[Line]:
    return nodes.lines(_of_size(args, nodes.SETTINGS))


def _plans(args: argparse.Namespace) -> list[Line]:
    return plans.lines(_of_size(args, plans.SETTINGS), args.only)


def _population(args: argparse.Namespace) -> list[Line]:
    setting = _of_size(args, population.SETTINGS)
    return population.lines(
        replace(setting, seeds=tuple(range(args.seeds))) if args.seeds else setting
    )


def _methods(args: argparse.Namespace) -> list[Line]:
    setting = _of_size(args, methods.SETTINGS)
    changes = {"seeds": tuple(range(args.seeds))} if args.seeds else {}
    return methods.lines(replace(setting, **changes), args.only, OUT)  # type: ignore[arg-type]


def _paces(args: argparse.Namespace) -> list[Line]:
    return paces.lines(_of_size(args, paces.SETTINGS), args.only)


def _tables(args: argparse.Namespace) -> list[Line]:
    setting = tables.Setting(pairs=args.pairs)
    return tables.lines(replace(setting, rows=2000) if args.toy else setting, args.only)


def _whole_model(args: argparse.Namespace) -> list[Line]:
    setting = whole_model.Setting(size=args.size) if args.size else whole_model.Setting()
    return whole_model.lines(whole_model.TOY if args.toy else setting, args.only)


def _of_size(args: argparse.Namespace, settings: dict[str, S]) -> S:
    """Return the benchmark's setting of the requested size.

    Raises Skipped if the benchmark has no setting of that size.
    """
    name = "small" if args.toy else args.size or "real"
    if name not in settings:
        raise Skipped(f"--size {name} is none of {', '.join(settings)}")
    return settings[name]


def _serving(args: argparse.Namespace) -> list[Line]:
    setting = serving.Setting(pairs=args.pairs, size=args.size or "6x192")
    if args.toy:
        setting = replace(
            setting, size="toy", lengths=(3,), prompts=2, many=4, clients=4, requests=8, inputs=5
        )
    parts: dict[str, Callable[[serving.Setting], list[Line]]] = {
        "peer": serving.peer_lines,
        "many": serving.many_lines,
        "http": serving.http_lines,
    }
    if find_spec("ray") and find_spec("mlflow"):
        parts["live"] = lambda setting: live.live_lines(
            setting.size, 4 * setting.pairs, setting.pairs
        )
    return [line for name, lines in parts.items() if args.only in name for line in lines(setting)]


def _scaling(args: argparse.Namespace) -> list[Line]:
    return scaling.lines(scaling.TOY if args.toy else scaling.Setting(), args.only)


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Line]]] = {
    "step": _step,
    "packing": _packing,
    "overhead": _overhead,
    "evaluation": _evaluation,
    "labels": _labels,
    "accelerator": _accelerator,
    "logging": _logging,
    "search": _search,
    "trials": _trials,
    "nodes": _nodes,
    "plans": _plans,
    "population": _population,
    "serving": _serving,
    "scaling": _scaling,
    "methods": _methods,
    "paces": _paces,
    "tables": _tables,
    "whole_model": _whole_model,
}


def _experiment(name: str, args: argparse.Namespace) -> list[Line]:
    """Run an experiment on a chat model, and write its section for docs/experiments.md."""
    experiment = chat_model.EXPERIMENTS[name]
    chat_model.check_inputs(experiment)
    rows = chat_model.run(experiment, _chat_setting(args), args.set, args.only)
    if not rows:
        labels = ", ".join(series.label for series in experiment.series)
        raise Skipped(f"--only {args.only} is in none of {labels}")
    _write_section(name, rows, args)
    return chat_model.lines(rows, experiment.elsewhere)


def _experiment_tables(args: argparse.Namespace) -> list[Line]:
    """Write the sections of all experiments from saved results."""
    setting = _chat_setting(args)
    found = []
    for name, experiment in chat_model.EXPERIMENTS.items():
        if args.only not in name:
            continue
        rows = chat_model.finished(experiment, setting, args.set)
        if any(row.outcomes for row in rows):
            _write_section(name, rows, args)
            found += chat_model.lines(rows, experiment.elsewhere)
        else:
            print(f"{name}: no results yet")
    return found


def _chat_setting(args: argparse.Namespace) -> chat_model.Setting:
    setting = _of_size(args, chat_model.SETTINGS)
    return replace(setting, seeds=args.seeds) if args.seeds else setting


def _write_section(name: str, rows: Sequence[chat_model.Row], args: argparse.Namespace) -> None:
    """Print the section, and write it to a file unless ``--only`` leaves out some of its rows."""
    section = "\n".join(chat_model.markdown(name, chat_model.EXPERIMENTS[name], rows))
    print(f"\n{section}\n", flush=True)
    if len(rows) == len(chat_model.EXPERIMENTS[name].series):
        file = chat_model.RESULTS / f"{name}{_chat_setting(args).suffix}.md"
        write_whole(file, f"{section}\n".encode())


ON_REQUEST: dict[str, Callable[[argparse.Namespace], list[Line]]] = {
    **{f"experiments-{name}": partial(_experiment, name) for name in chat_model.EXPERIMENTS},
    "experiments-tables": _experiment_tables,
}
"""Hours of experiments, which only run when they are named."""


def main(arguments: Sequence[str], out: Path = OUT) -> int:
    """Run the named benchmarks, or all that need not be named."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.names or BENCHMARKS:
        print(f"\n{name}")
        try:
            lines = (BENCHMARKS | ON_REQUEST)[name](args)
        except Skipped as reason:
            print(f"skipped: {reason}")
            continue
        print("\n".join(table(lines)), flush=True)
        document = {
            "version": orchestrator.__version__,
            "machine": machine(),
            "rows": [one.document() for one in lines],
        }
        (out / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"\nwritten to {out}/")
    return 0


def machine() -> dict[str, str | int]:
    """Return the machine and software that the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    made.add_argument(
        "names",
        nargs="*",
        choices=[[], *BENCHMARKS, *ON_REQUEST],
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)} (all by default); or {', '.join(ON_REQUEST)}",
    )
    made.add_argument(
        "--only",
        default="",
        help="lines, sides or jobs with this in their name; "
        "also packing: speed, memory; logging: search, listing; "
        "serving: peer, many, http, live; scaling: search, service",
    )
    made.add_argument(
        "--size",
        help="one of the models 6x192, 6x512, 100M, 1B; of whole searches: small or real; "
        "of methods also short, of search also middle, long and usual, of labels also many",
    )
    made.add_argument(
        "--seeds",
        type=int,
        default=0,
        help="search, population, methods: so many seeds (default 3)",
    )
    made.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="experiments: override a key of every job, for instance base_model.dtype=bfloat16",
    )
    made.add_argument(
        "--pairs", type=int, default=3, help="how often each side is measured, in turn (default 3)"
    )
    made.add_argument(
        "--threads", type=int, default=0, help="threads of torch (default: torch's own choice)"
    )
    made.add_argument(
        "--peak", type=float, help="the accelerator's peak in TFLOPS, where its name is unknown"
    )
    made.add_argument(
        "--toy",
        action="store_true",
        help="toy size: seconds (whole searches: minutes), to see that all of it runs",
    )
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
