"""Real data sets written as CSV and TSV give the same token ids as their JSON Lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from orchestrator.data.cells import cell_text
from orchestrator.data.dataset import SPLITS, RowSplits, load_rows
from orchestrator.data.encoding import make_encoder
from orchestrator.job.spec import BaseModelSpec, DataSpec
from orchestrator.models.source import resolve_model

SHARED = Path(__file__).parents[3] / "shared"
ROWS = 500  # of each split; the cells of all rows are compared
TASKS = {
    "sms_spam": ("{text}\nSpam or not?", "label_name"),
    "trec6": ("{text}\n{fine}", "label"),
    "sst2": ("{text}", "label_name"),
    "uci_sentiment": ("{source}: {text}", "label"),
    "e2e_nlg": ("{input}\n", "target"),
    "fewglue_rte": ("{text1}\n{text2}?", "label_name"),
    "lama_trex": ("{template} {input}", "target"),
}
DIALECTS: dict[str, dict[str, Any]] = {
    "quoted where needed.csv": {"quoting": csv.QUOTE_MINIMAL, "lineterminator": "\r\n"},
    "quoted.tsv": {"quoting": csv.QUOTE_ALL, "delimiter": "\t", "lineterminator": "\n"},
    "unquoted.tsv": {
        "quoting": csv.QUOTE_NONE,
        "delimiter": "\t",
        "lineterminator": "\n",
        "quotechar": None,
    },
}


@cache
def tokenizer() -> Any:
    return resolve_model(
        BaseModelSpec(id=str(SHARED / "models" / "stories260K")), weights=False
    ).tokenizer()


def cells(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row as CSV can hold it: every cell as text, lists left out."""
    return {name: cell_text(cell) for name, cell in row.items() if not isinstance(cell, list)}


def rewrite(source: Path, target: Path, dialect: Mapping[str, Any]) -> str:
    """Write a JSON Lines file in another format.

    Skips the test where cells hold tabs or line breaks and the format has no quoting.
    """
    rows = [
        cells(json.loads(line)) for line in source.read_text(encoding="utf-8").splitlines() if line
    ]
    if dialect["quoting"] == csv.QUOTE_NONE and any(
        set(cell) & set("\t\r\n") for row in rows for cell in row.values()
    ):
        pytest.skip(f"{source} has tabs or line breaks in its cells")
    with target.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, **dialect)
        writer.writerow(rows[0])
        writer.writerows(row.values() for row in rows)
    return str(target)


def token_ids(rows: RowSplits, data: DataSpec) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    encoder = make_encoder(data, rows, tokenizer())
    splits = [encoder.encode(rows[split][:ROWS], data.target) for split in SPLITS]
    return [(split.inputs, split.targets) for split in splits]


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", TASKS)
def test_csv_and_tsv_give_the_token_ids_of_the_jsonl(
    name: str, dialect: str, tmp_path: Path
) -> None:
    """All cells have the same texts, and inputs and targets the same token ids."""
    folder = SHARED / "data" / name
    if not folder.exists() or not (SHARED / "models").exists():
        pytest.skip(f"no {folder}")
    template, target = TASKS[name]
    files = {
        split: folder / f"{split}.jsonl" for split in SPLITS if (folder / f"{split}.jsonl").exists()
    }
    suffix = dialect[-4:]
    written = {
        split: rewrite(file, tmp_path / f"{split}{suffix}", DIALECTS[dialect])
        for split, file in files.items()
    }
    specs = [
        DataSpec.model_validate(
            {
                "path": path,
                "template": template,
                "target": target,
                "max_target_tokens": 900,
                "empty": "keep",  # some rows of lama_trex have no template
            }
        )
        for path in ({split: str(file) for split, file in files.items()}, written)
    ]
    original, rewritten = (load_rows(spec) for spec in specs)
    for split in SPLITS:
        assert [cells(row) for row in rewritten[split]] == [cells(row) for row in original[split]]
    assert token_ids(rewritten, specs[1]) == token_ids(original, specs[0])
