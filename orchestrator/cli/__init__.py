"""The command line: thin verbs. Heavy libraries are imported inside them, so that --help answers at once."""

from orchestrator.cli.entry import main
from orchestrator.cli.groups import app

__all__ = ["app", "main"]
