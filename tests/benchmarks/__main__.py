"""``make bench``: every side-by-side measurement; a table on the screen, JSON in build/bench/."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import orchestrator  # before torch: it sets how OpenMP threads wait
from tests.benchmarks import step
from tests.benchmarks.measure import Comparison

OUT = Path("build/bench")
BENCHMARKS = {"step": step.comparisons}


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all of them."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name in names or BENCHMARKS:
        rows = BENCHMARKS[name]()
        print(f"\n{name}\n" + "\n".join(table(rows)))
        machine = {"processor": platform.processor(), "python": platform.python_version()}
        document = {"version": orchestrator.__version__, "machine": machine, "rows": [row.document() for row in rows]}
        (OUT / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    print(f"\nwritten to {OUT}/")
    return 0


def table(rows: list[Comparison]) -> list[str]:
    """One line a comparison: how many times faster ours is, with the spread over the pairs."""
    lines = [f"{'what':44} {'ours, ms':>10} {'peer, ms':>10} {'times faster':>14}  spread"]
    for row in rows:
        low, median, high = row.ratios()
        lines.append(f"{row.name:44} {row.ours_ms:10.1f} {row.peer_ms:10.1f} {median:14.2f}  {low:.2f} to {high:.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
