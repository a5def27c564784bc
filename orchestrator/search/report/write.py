"""Output of a search's report to the search's folder and its MLflow run."""

from __future__ import annotations

from pathlib import Path

from orchestrator.registry import Registry
from orchestrator.search.report.facts import SearchFacts
from orchestrator.utils.atomic import write_whole

PAGE = "report.html"


def write_report(facts: SearchFacts, file: Path, registry: Registry | None) -> None:
    """Write the page to ``file``; with a ``registry``, log page and figures to the search's run."""
    from orchestrator.search.report.figures import draw
    from orchestrator.search.report.page import page

    figures = draw(facts)
    text = page(facts, figures)
    write_whole(file, text.encode())
    if registry is not None:
        files = {f"figures/{name}.svg": svg for name, svg in figures.items()}
        registry.log_files(facts.run_id, {PAGE: text.encode(), **files})
