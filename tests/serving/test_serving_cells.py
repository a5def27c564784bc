"""A cell is the same text wherever it is read.

It is read in training, evaluation, /classify, the offline model and MLflow's model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from orchestrator.artifact import MANIFEST, CellsRecord, PromptArtifact
from orchestrator.cli.workbench.domain_shift import Question, _groups
from orchestrator.data.dataset import load_rows
from orchestrator.data.encoding import make_encoder
from orchestrator.errors import BadInput
from orchestrator.job.spec import DataSpec
from orchestrator.models.backbone import Backbone
from orchestrator.serving.http.protocol import ApiError, ClassifyRequest, parse_body
from orchestrator.serving.offline import OfflineModel
from orchestrator.serving.prompts.served_prompt import load_prompt

Ids = list[list[int]]

TEMPLATE = "{text} of {more}\nSpam?"
LABELS = {0: " ham", 1: " spam"}
ODD: list[Any] = [
    0, 1, -5, 10**25, 1.0, 0.5, -0.0, 1e-7, 1e21, True, False, "true", "None", "null", "nan", "NA",
    "007", "1.10", "2024-01-02", "2024-01-02T00:00:00", " a ", "é日本\u2028", '"quoted"\t',
    [], ["a", 1, None], {}, {"b": "x", "n": 0},
    [{"é": [True, 1.5]}], "x" * 300, ["long"] * 100,
]  # fmt: skip
ROWS = [{"text": cell, "more": cell, "label": place % 2} for place, cell in enumerate(ODD)]
REFUSED: list[tuple[Any, str]] = [
    ({"more": "a"}, "text"),
    ({"text": None, "more": "a"}, "text"),
    ({"text": "a", "more": None}, "more"),
]


@pytest.fixture
def folder(make_artifact: Callable[..., Path]) -> Path:
    return make_artifact("odd", template=TEMPLATE, verbalizer=LABELS)


def jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def data(file: Path, **changes: Any) -> DataSpec:
    path = {"train": str(file), "validation": str(file), "test": str(file)}
    given = {
        "path": path,
        "template": TEMPLATE,
        "target": "label",
        "verbalizer": LABELS,
        "max_input_tokens": 64,
    }
    return DataSpec.model_validate({**given, **changes})


def trained_ids(file: Path, backbone: Backbone) -> Ids:
    """Return the input ids that training makes of the test rows of a file."""
    spec = data(file)
    rows = load_rows(spec)
    return make_encoder(spec, rows, backbone.tokenizer).encode(rows.test, "label").inputs


def recorded(ask: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Ids:
    """Return the token ids that the base model is given while ``ask`` runs."""
    seen: Ids = []
    probs = OfflineModel._probs

    def look(self: OfflineModel, inputs: Ids) -> list[list[float]]:
        seen.extend(inputs)
        return probs(self, inputs)

    monkeypatch.setattr(OfflineModel, "_probs", look)
    ask()
    return seen


def predict(folder: Path, backbone: Backbone, frame: pd.DataFrame) -> list[Any]:
    """Return the answers of MLflow's model for a data frame, on a loaded base model."""
    from orchestrator.registry.versions.pyfunc_model import PromptModel  # imports mlflow

    model = PromptModel()
    model.load_context(SimpleNamespace(artifacts={"prompt": str(folder)}))
    model.model = OfflineModel.from_artifact(folder, backbone)
    return model.predict(None, frame)


def test_every_side_gives_a_cell_the_same_tokens(
    folder: Path, backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, booleans, lists, objects and texts that look like one have equal tokens.

    Training and evaluation cut long cells in the same way.
    """
    file = jsonl(tmp_path / "odd.jsonl", ROWS)
    prompt, offline = (
        load_prompt(backbone, folder, "odd", 1),
        OfflineModel.from_artifact(folder, backbone),
    )
    expected = trained_ids(file, backbone)
    assert len({tuple(ids) for ids in expected}) >= len(ODD) - 4 and max(map(len, expected)) == 64
    question = Question(str(file))
    (group,) = _groups(PromptArtifact.load(folder), question)
    assert prompt.encoder.encode(group.rows, "label").inputs == expected
    cells = [{"text": row["text"], "more": row["more"]} for row in ROWS]
    body = json.dumps({"model": "odd", "input": cells}).encode()
    served = [
        prompt.encode(row, 0)
        for row in parse_body(ClassifyRequest, body).inputs
        if len(str(row)) < 300
    ]
    short = [ids for ids, row in zip(expected, cells, strict=True) if len(str(row)) < 300]
    assert served == short
    frame = pd.DataFrame(cells, dtype=object)
    fitting = [place for place, row in enumerate(cells) if len(str(row)) < 300]
    asked = recorded(lambda: offline.classify([cells[place] for place in fitting]), monkeypatch)
    assert asked == short
    assert recorded(lambda: predict(folder, backbone, frame.iloc[fitting]), monkeypatch) == short


@pytest.mark.parametrize("cell", [b"bytes", float("inf"), [float("nan")], {1: "a"}, "\ud800"])
def test_what_training_refuses_no_side_takes(folder: Path, backbone: Backbone, cell: Any) -> None:
    """The offline model and MLflow's model refuse such a cell.

    Over HTTP it can't be written, or is refused as JSON.
    """
    offline = OfflineModel.from_artifact(folder, backbone)
    row = {"text": "a", "more": cell}
    with pytest.raises(BadInput, match=r"row 1: column 'more': a cell holds"):
        offline.classify([row])
    with pytest.raises(BadInput, match=r"row 2: column 'more': a cell holds"):
        predict(folder, backbone, pd.DataFrame([{"text": "a", "more": "b"}, row], dtype=object))


@pytest.mark.parametrize(
    "text",
    ["NaN", "Infinity", "[NaN]", "1e400", '{"a": -1e999}', '"\\ud800"', "[" * 150 + "]" * 150],
)
def test_json_that_has_no_text_is_refused_over_http(
    folder: Path, backbone: Backbone, text: str
) -> None:
    """JSON without a text form is a bad request, wherever that is noticed."""
    prompt = load_prompt(backbone, folder, "odd", 1)
    body = f'{{"model": "odd", "input": {{"text": {text}, "more": "a"}}}}'
    with pytest.raises((ApiError, BadInput)):
        prompt.encode(parse_body(ClassifyRequest, body.encode()).inputs[0], 0)


@pytest.mark.parametrize(("row", "column"), REFUSED)
def test_a_missing_column_is_refused_by_name(
    folder: Path, backbone: Backbone, row: Any, column: str
) -> None:
    """Absent and null values are refused alike; NaN in a data frame counts as null."""
    offline = OfflineModel.from_artifact(folder, backbone)
    with pytest.raises(BadInput, match=rf"row 1: a row (lacks|has no value in) \['{column}'\]"):
        offline.classify([row])
    frame = pd.DataFrame([{"text": "a", "more": "b"}, row])
    with pytest.raises(BadInput, match=rf"row 2: a row (lacks|has no value in) \['{column}'\]"):
        predict(folder, backbone, frame)


def test_a_version_tuned_with_empty_inputs_takes_them(
    make_artifact: Callable[..., Path], backbone: Backbone, tmp_path: Path
) -> None:
    """Absent, null and empty cells are the empty text, as in training."""
    kept = make_artifact(
        "kept", template=TEMPLATE, verbalizer=LABELS, cells=CellsRecord(empty="keep")
    )
    file = jsonl(
        tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "b", "more": None, "label": 1}]
    )
    with pytest.raises(BadInput, match="no text in column 'more'"):
        load_rows(data(file))
    spec = data(file, empty="keep")
    rows = load_rows(spec)
    expected = make_encoder(spec, rows, backbone.tokenizer).encode(rows.test, "label").inputs
    prompt = load_prompt(backbone, kept, "kept", 1)
    assert [
        prompt.encode(row, 0) for row in ({"text": "a"}, {"text": "b", "more": None})
    ] == expected
    assert prompt.encode({"text": "a", "more": ""}, 0) == expected[0]
    (group,) = _groups(PromptArtifact.load(kept), Question(str(file)))
    assert prompt.encoder.encode(group.rows, "label").inputs == expected


def test_an_early_version_goes_on_as_it_was_tuned(folder: Path, backbone: Backbone) -> None:
    """A manifest without a record of cells means Python's texts, and empty text for null."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["cells"]
    (folder / MANIFEST).write_text(json.dumps(manifest))
    prompt = load_prompt(backbone, folder, "early", 1)
    assert prompt.manifest.cells is None
    assert prompt.encode({"text": True, "more": None}, 0) == prompt.encode(
        {"text": "True", "more": ""}, 0
    )
    assert prompt.encode({"text": 1.5, "more": 3}, 0) == prompt.encode(
        {"text": "1.5", "more": "3"}, 0
    )
    with pytest.raises(BadInput, match=r"lacks \['more'\]"):
        prompt.encode({"text": "a"}, 0)


@pytest.mark.parametrize("key", [1, 1.0, "1", True, "true", "007"])
def test_an_answer_has_the_label_as_the_verbalizer_spells_it(
    make_artifact: Callable[..., Path], backbone: Backbone, key: Any
) -> None:
    """A label keeps its type through the manifest."""
    labels = make_artifact("labels", verbalizer={key: " ham", "other": " spam"})
    answers = OfflineModel.from_artifact(labels, backbone).classify(
        ["win a prize", "the quick brown fox", "a", "b"]
    )
    found = load_prompt(backbone, labels, "labels", 1).labels
    assert found == (key, "other") and type(found[0]) is type(key)
    assert all(type(row["label"]) in (type(key), str) for row in answers)


def test_groups_are_named_by_the_text_of_their_cell(folder: Path, tmp_path: Path) -> None:
    """Groups have the text of their cell; rows without a value form their own group."""
    kinds = [True, "true", None, "", 1.5, ["a"], {"b": 1}]
    rows = [{"text": "a", "more": "b", "label": 0, "kind": kind} for kind in kinds]
    question = Question(str(jsonl(tmp_path / "kinds.jsonl", rows)), by="kind")
    whole, *parts = _groups(PromptArtifact.load(folder), question)
    assert whole.label == "" and len(whole.rows) == len(kinds)
    assert {part.label: list(part.places) for part in parts} == {
        "true": [0, 1], "(empty)": [2, 3], "1.5": [4], '["a"]': [5], '{"b": 1}': [6]
    }  # fmt: skip


@pytest.mark.parametrize("cell", ["", None])
def test_evaluation_refuses_an_empty_input(folder: Path, tmp_path: Path, cell: Any) -> None:
    """The error names the file and the line, as in training."""
    rows = [{"text": "a", "more": "b", "label": 0}, {"text": "a", "more": cell, "label": 1}]
    file = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BadInput, match=r"rows\.jsonl:2 \(row 2\) has no text in column 'more'"):
        _groups(PromptArtifact.load(folder), Question(str(file)))
