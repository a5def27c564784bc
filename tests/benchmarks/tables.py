"""Reading a large table with our reader, and with the ``datasets`` library that it replaced.

Time is measured in turn in one process, memory in a fresh process for each reader: ``python -m
tests.benchmarks.tables JSON``.
"""

from __future__ import annotations

import csv
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.data.tables import read_table
from tests.benchmarks.measure import Line, compare, in_fresh_process
from tests.benchmarks.memory import MEGABYTE, forget_peak_of_process, status_bytes

WORDS = ("the", "of", "alpha", "beta", "gamma", "delta", "omega", "comma,", "007", "NA")
FEW_ROWS = 100
"""Rows to read first, so that a reader has imported all its modules."""


@dataclass(frozen=True)
class Setting:
    """Number of rows, and their ``width`` in characters, line end included."""

    rows: int = 1_000_000
    width: int = 100
    pairs: int = 3
    formats: tuple[str, ...] = ("csv", "tsv", "jsonl")


def lines(setting: Setting, only: str = "") -> list[Line]:
    """Return, for each format, the time of both readers and their memory beside the rows."""
    with tempfile.TemporaryDirectory() as folder:
        return [
            _line(write(Path(folder, f"rows.{name}"), setting.rows, setting.width), setting)
            for name in setting.formats
            if only in name
        ]


def _line(file: Path, setting: Setting) -> Line:
    name = f"{setting.rows:,} rows of {setting.width} characters, {file.suffix[1:]}"
    comparison = compare(name, lambda: ours(file), lambda: peer(file), setting.pairs)
    size = file.stat().st_size
    few = write(file.with_stem("few"), FEW_ROWS, setting.width)
    memory = {
        reader: in_fresh_process(
            "tests.benchmarks.tables", {"reader": reader, "file": str(file), "few": str(few)}
        )
        for reader in ("ours", "peer")
    }
    return comparison.line(
        **{
            "file, MB": size / MEGABYTE,
            "rows, MB": memory["ours"]["rows"] / MEGABYTE,
            "beside, of file": memory["ours"]["beside"] / size,
            "peer beside": memory["peer"]["beside"] / size,
        }
    )


def write(file: Path, rows: int, width: int) -> Path:
    """Write rows of about ``width`` characters: a number, words, and a label."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8", newline="") as stream:
        if file.suffix == ".jsonl":
            for row in _rows(draw, rows, width - len('{"text": "", "label": ""}')):
                stream.write(json.dumps(dict(zip(("text", "label"), row, strict=True))) + "\n")
        elif file.suffix == ".tsv":
            stream.write("text\tlabel\n")
            stream.writelines("\t".join(row) + "\n" for row in _rows(draw, rows, width))
        else:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(("text", "label"))
            writer.writerows(_rows(draw, rows, width - len('""')))
    return file


def _rows(draw: random.Random, rows: int, width: int) -> Any:
    for number in range(rows):
        text = f"{number} {' '.join(draw.choices(WORDS, k=width // 4))}"
        yield text[: width - 5], draw.choice(("yes", "no."))


def ours(file: Path) -> Sequence[Any]:
    """Read a file as a job does."""
    return read_table(file, "data.path.train").rows


def peer(file: Path) -> Sequence[Any]:
    """Read a file with pandas or Arrow through ``datasets``, without its cache."""
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        if file.suffix == ".jsonl":
            return list(Dataset.from_json(str(file), keep_in_memory=True, cache_dir=cache))
        delimiter = "\t" if file.suffix == ".tsv" else ","
        return list(
            Dataset.from_csv(str(file), keep_in_memory=True, cache_dir=cache, sep=delimiter)
        )


def measure_here(reader: str, file: Path, few: Path) -> dict[str, float]:
    """Return the bytes of the rows, and the most bytes that reading takes beside them."""
    read = {"ours": ours, "peer": peer}[reader]
    read(few)
    before = forget_peak_of_process()
    rows = read(file)
    held = status_bytes("VmRSS")
    assert rows
    return {"rows": held - before, "beside": status_bytes("VmHWM") - held}


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    print(
        json.dumps(
            measure_here(arguments["reader"], Path(arguments["file"]), Path(arguments["few"]))
        )
    )
