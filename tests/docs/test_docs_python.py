"""The code of docs/python.md fits the Python interface, and the notebooks of docs/ run."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from notebooks import FOLDER, ORDER, code_cells, read, run, source

import orchestrator as po

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VARIABLES: dict[str, Any] = {
    "po": po, "job": po.Job, "plan": po.SearchPlan, "result": po.SearchResult,
    "prompt": po.RegisteredPrompt, "found": po.Evaluation,
}  # fmt: skip
"""What the variables of the page and of the notebooks are."""


def texts() -> list[tuple[str, str]]:
    """Return the code of the page and of each notebook, by name."""
    page = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    cells = [(name, source(cell)) for name in ORDER for cell in code_cells(read(name))]
    return [*(("python.md", block) for block in page), *cells]


def faults(code: str) -> Iterator[str]:
    """Yield what the code uses that the interface does not have, or calls in another way."""
    for node in ast.walk(ast.parse(code)):
        call = node if isinstance(node, ast.Call) else None
        used = call.func if call else node
        if not (isinstance(used, ast.Attribute) and isinstance(used.value, ast.Name)):
            continue
        owner = VARIABLES.get(used.value.id)
        if owner is None:
            continue
        if not hasattr(owner, used.attr) or (owner is po and used.attr not in po.__all__):
            yield f"{used.value.id} has no {used.attr}"
        elif call is not None:
            yield from call_faults(getattr(owner, used.attr), call, isinstance(owner, type))


def call_faults(function: Any, call: ast.Call, is_method: bool) -> Iterator[str]:
    values = [None] * (len(call.args) + is_method)
    if isinstance(function, type):
        values, function = [None, *values], function.__init__
    options = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    try:
        inspect.signature(function).bind(*values, **options)
    except TypeError as error:
        yield f"{ast.unparse(call)}: {error}"


def test_the_code_fits_the_interface() -> None:
    """Every name and every call in the page and in the notebooks is one that exists."""
    code = texts()
    assert {name for name, _ in code} == {"python.md", *ORDER} and len(code) > 15
    assert not [(name, fault) for name, block in code for fault in faults(block)]


@pytest.mark.parametrize(
    "wrong",
    ["po.rnu(job)", "po.errors", "result.trial", "po.run(job, quiet=True)", "prompt.load()"],
)
def test_a_wrong_name_or_call_would_be_noticed(wrong: str) -> None:
    """Names that do not exist, modules inside the package, and unknown arguments are found."""
    assert [*faults(wrong)]


def test_every_public_function_is_on_the_page() -> None:
    """The page shows each name of the interface but the types of what functions return."""
    text = PAGE.read_text(encoding="utf-8")
    returned = {"SearchPlan", "SearchResult", "BestTrial", "Report", "RegisteredPrompt", "Problem"}
    missing = {*po.__all__} - returned - {"Evaluation"}
    assert not {name for name in missing if not re.search(rf"\bpo\.{name}\b", text)}


@pytest.mark.parametrize("name", ORDER)
def test_a_notebook_was_run_as_a_whole(name: str) -> None:
    """Cells have outputs of one run, from the first cell to the last, without errors."""
    document = read(name)
    cells = code_cells(document)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [it for it in outputs if it["output_type"] == "error"]
    assert document["nbformat"] == 4
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000


@pytest.mark.long
@pytest.mark.ray
def test_the_notebooks_run(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first registers a prompt in an empty folder; the second uses it there."""
    monkeypatch.chdir(tmp_path)
    document, tuned = run("tune")
    assert tuned["result"].finished and len(tuned["result"].trials) == 6
    assert tuned["result"].model == "reviews:1" and (tmp_path / "report.html").is_file()
    shown = [output for cell in code_cells(document) for output in cell["outputs"]]
    progress = next(output for output in shown if output["output_type"] == "display_data")
    assert "6 trials" in "".join(progress["data"]["text/html"])
    _, used = run("use")
    assert [answer["label"] for answer in used["answers"]] == ["happy", "unhappy", "happy"]
    assert used["found"].groups.rows.to_dict() == {"plain": 4, "negated": 4}
