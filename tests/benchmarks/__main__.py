"""``make bench``: every measurement of the tuning engine; tables on the screen, JSON in build/bench/."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import orchestrator  # before torch, to which it says how OpenMP's threads wait

# isort: split
import torch

from orchestrator.backbone import default_device
from tests.benchmarks import accelerator, evaluation, overhead, packing, serving, step
from tests.benchmarks.measure import Line, table
from tests.benchmarks.subjects import TOY

OUT = Path("build/bench")


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
    return evaluation.lines(replace(setting, size="toy", prompts=(2,), rows=4, answers=(2,)) if args.toy else setting)


def _accelerator(args: argparse.Namespace) -> list[Line]:
    if args.toy:
        toy = accelerator.Setting(default_device(), args.peak or 1.0, ("toy",), (1, 2), rows=2, pairs=args.pairs)
        return accelerator.lines(toy)
    setting = accelerator.accelerator(args.peak)
    return accelerator.lines(replace(setting, sizes=(args.size,)) if args.size else setting)


def _serving(args: argparse.Namespace) -> list[Line]:
    setting = serving.Setting(pairs=args.pairs, size=args.size or "6x192")
    if args.toy:
        setting = replace(setting, size="toy", lengths=(3,), prompts=2, many=4, clients=4, requests=8, inputs=5)
    parts = {"peer": serving.peer_lines, "many": serving.many_lines, "http": serving.http_lines}
    return [line for name, lines in parts.items() if args.only in name for line in lines(setting)]


BENCHMARKS: dict[str, Callable[[argparse.Namespace], list[Line]]] = {
    "step": _step,
    "packing": _packing,
    "overhead": _overhead,
    "evaluation": _evaluation,
    "accelerator": _accelerator,
    "serving": _serving,
}


def main(arguments: Sequence[str], out: Path = OUT) -> int:
    """Run the named benchmarks, or all of them."""
    args = parser().parse_args(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in args.names or BENCHMARKS:
        print(f"\n{name}")
        try:
            lines = BENCHMARKS[name](args)
        except accelerator.Skipped as reason:
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
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    made.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME", help=", ".join(BENCHMARKS))
    only = "step: lines with this in their name; packing: speed or memory; serving: peer, many or http"
    made.add_argument("--only", default="", help=only)
    made.add_argument("--size", help="one of the models 6x192, 6x512, 100M, 1B instead of the benchmark's own")
    made.add_argument("--pairs", type=int, default=3, help="how often each side is measured, in turn (default 3)")
    made.add_argument("--threads", type=int, default=0, help="threads of torch (default: torch's own choice)")
    made.add_argument("--peak", type=float, help="the accelerator's peak in TFLOPS, where its name is unknown")
    made.add_argument("--toy", action="store_true", help="toy size: seconds, to see that all of it runs")
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
