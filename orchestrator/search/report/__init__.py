"""The report of a search as figures and as one HTML page, made from the search's folder.

Importing this package is cheap; drawing is not.
"""

from orchestrator.search.report.comparison import comparison, comparison_page, comparison_rows
from orchestrator.search.report.facts import SearchFacts, read_facts
from orchestrator.search.report.write import write_report

__all__ = [
    "SearchFacts",
    "comparison",
    "comparison_page",
    "comparison_rows",
    "read_facts",
    "write_report",
]
