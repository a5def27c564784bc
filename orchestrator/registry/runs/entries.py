"""The entries that a search log queues for MLflow.

Entries are small values. They can be merged, and can be saved to disk while MLflow is unreachable.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

Item = TypeVar("Item")

MAX_PARAM = 6000
MAX_TAG = 5000

Kind = Literal["start", "log", "end", "finish"]
Point = tuple[str, float, int, int]  # metric, value, step, milliseconds


@dataclass
class LogEntry:
    """One write to one run: a trial's run, or the search's own run when ``trial`` is None."""

    kind: Kind
    trial: str | None = None
    metrics: list[Point] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    name: str = ""
    """The run's name, for an entry of kind start."""
    status: str = ""
    """MLflow's run status, for an entry of kind end or finish."""
    at: int = field(default_factory=lambda: int(time.time() * 1000))

    def absorb(self, other: LogEntry) -> None:
        self.metrics.extend(other.metrics)
        self.params.update(other.params)
        self.tags.update(other.tags)


def coalesce(entries: Iterable[LogEntry]) -> list[LogEntry]:
    """Merge each run's log entries between its start and its end.

    The order of entries within a run does not change.
    """
    merged: list[LogEntry] = []
    open_logs: dict[str | None, LogEntry] = {}
    for entry in entries:
        if entry.kind == "finish":
            open_logs.clear()
        elif entry.kind != "log":
            open_logs.pop(entry.trial, None)
        elif entry.trial in open_logs:
            open_logs[entry.trial].absorb(entry)
            continue
        else:
            open_logs[entry.trial] = entry
        merged.append(entry)
    return merged


def chunks(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def as_texts(values: Mapping[str, Any], limit: int) -> dict[str, str]:
    """Convert values to the texts that MLflow stores.

    A text longer than ``limit`` is cut, and its end says how long it was.
    """
    return {str(key)[:250]: _cut(_text(value), limit) for key, value in values.items()}


def _text(value: Any) -> str:
    return (
        json.dumps(value, ensure_ascii=False)
        if isinstance(value, dict | list | tuple)
        else str(value)
    )


def _cut(text: str, limit: int) -> str:
    note = f"... ({len(text)} characters)"
    return text if len(text) <= limit else text[: limit - len(note)] + note


SIZES = {
    "num_virtual_tokens": "{} tokens",
    "rank": "rank {}",
    "bottleneck": "bottleneck {}",
    "shots": "{} demonstrations",
}


def run_label(config: Mapping[str, Any], trial: str) -> str:
    """Name a child run by the settings that distinguish trials."""
    init = config.get("init")
    parts = (
        [f"text {init['text'][:30]!r}" if isinstance(init, dict) and "text" in init else str(init)]
        if init
        else []
    )
    parts += [text.format(config[name]) for name, text in SIZES.items() if name in config]
    if isinstance(rate := config.get("learning_rate"), int | float):
        parts.append(f"lr {rate:.3g}")
    if "seed" in config:
        parts.append(f"seed {config['seed']}")
    return ", ".join(parts) or trial


def save_entries(file: Path, entries: Iterable[LogEntry]) -> None:
    """Write the entries as JSON lines, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staging = file.with_name(f".{file.name}.{os.getpid()}")
    with staging.open("w", encoding="utf-8") as stream:
        for entry in entries:
            stream.write(json.dumps(asdict(entry)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    staging.replace(file)


def load_entries(file: Path) -> list[LogEntry]:
    """Read a file written by ``save_entries``; return no entries if there is no file."""
    if not file.exists():
        return []
    with file.open(encoding="utf-8") as stream:
        entries = [LogEntry(**json.loads(line)) for line in stream]
    for entry in entries:
        entry.metrics = [(key, value, step, at) for key, value, step, at in entry.metrics]
    return entries
