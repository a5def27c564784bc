"""Runs the notebooks of docs/, and writes their outputs into them: ``python -m tests.notebooks``.

Cells run in this process, without Jupyter: a cell's outputs are what it prints, what a search shows
as its progress, and the value of its last line as text and as HTML.
"""

from __future__ import annotations

import ast
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from orchestrator.cli.python import notebook

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
ORDER = ("tune", "use")  # the second uses what the first has registered
Outputs = list[dict[str, Any]]


def read(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return document


def code_cells(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def run(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a notebook in the working directory; return it with outputs, and its variables."""
    document, variables = read(name), {"__name__": "__main__"}
    for number, cell in enumerate(code_cells(document), start=1):
        cell["execution_count"] = number
        cell["outputs"] = run_cell(source(cell), f"{name}[{number}]", variables, number)
    return document, variables


def run_cell(code: str, name: str, variables: dict[str, Any], number: int) -> Outputs:
    tree = ast.parse(code)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with in_a_notebook() as shown, redirect_stdout(printed):
        exec(compile(tree, name, "exec"), variables)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), variables)
    outputs = [
        {"output_type": "display_data", "data": {"text/html": lines(html)}, "metadata": {}}
        for html in shown
    ]
    if printed.getvalue():
        text = lines(printed.getvalue())
        outputs.append({"output_type": "stream", "name": "stdout", "text": text})
    if value is not None:
        data = {"text/plain": lines(repr(value))}
        if callable(html := getattr(value, "_repr_html_", None)):
            data["text/html"] = lines(html())
        outputs.append(
            {
                "output_type": "execute_result",
                "data": data,
                "metadata": {},
                "execution_count": number,
            }
        )
    return outputs


def lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


@contextmanager
def in_a_notebook() -> Iterator[list[str]]:
    """Show progress as in a notebook, in the outputs that are yielded."""
    shown: list[str] = []

    def show(html: str) -> Callable[[str], None]:
        place = len(shown)
        shown.append(html)
        return lambda newer: shown.__setitem__(place, newer)

    with (
        patch.object(notebook, "in_notebook", lambda: True),
        patch.object(notebook.NotebookProgress.__init__, "__defaults__", (show,)),
    ):
        yield shown


def main() -> None:
    """Run the notebooks in an empty folder, and write them with their outputs."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ORDER:
            document, _ = run(name)
            text = json.dumps(document, indent=1, ensure_ascii=False)
            (FOLDER / f"{name}.ipynb").write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
