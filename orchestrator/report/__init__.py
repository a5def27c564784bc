"""A search as pictures and as one HTML page, from what its folder keeps. Importing it is cheap; drawing is not."""

from orchestrator.report.facts import SearchFacts, read_facts
from orchestrator.report.write import write_report

__all__ = ["SearchFacts", "read_facts", "write_report"]
