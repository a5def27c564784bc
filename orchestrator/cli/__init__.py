"""The command line: one thin function for each verb.

Heavy libraries are imported inside these functions, so that ``--help`` answers at once.
"""

from orchestrator.cli.entry import main, run_verb
from orchestrator.cli.groups import app

__all__ = ["app", "main", "run_verb"]
