"""Search, register and serve soft prompts for one frozen language model.

::

    import orchestrator as po

    result = po.run("job.yaml")           # or po.run(po.Job(...), data=frame)
    result.trials, result.curves          # data frames
    prompt = po.load("sms-spam@champion")
    prompt.classify(["win a prize now"])

docs/python.md shows more. The names are imported when they are first used, so that importing this
package stays cheap.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orchestrator.cli.python.jobs import Job, load_job
    from orchestrator.cli.python.prompts import Evaluation, RegisteredPrompt, load
    from orchestrator.cli.python.searches import (
        BestTrial,
        Report,
        SearchPlan,
        SearchResult,
        load_search,
        plan,
        resume,
        run,
    )
    from orchestrator.errors import (
        BadInput,
        Interrupted,
        JobFailed,
        NothingFound,
        OrchestratorError,
        Problem,
        SearchLost,
        SpecError,
        Unreachable,
    )

# OpenMP reads this once, when torch is first imported. OpenMP threads that spin while they wait for
# each other stall for whole time slices on a machine that runs anything else, and several of our
# processes always run at once. Measured: a factor of 30
# (docs/decisions/0001-threads-sleep.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"

__all__ = [
    # jobs and searches
    "Job",
    "load_job",
    "plan",
    "run",
    "resume",
    "load_search",
    "SearchPlan",
    "SearchResult",
    "BestTrial",
    "Report",
    # registered prompts
    "load",
    "RegisteredPrompt",
    "Evaluation",
    # errors
    "OrchestratorError",
    "BadInput",
    "SpecError",
    "Problem",
    "Unreachable",
    "JobFailed",
    "NothingFound",
    "SearchLost",
    "Interrupted",
]

_MODULES = {
    "orchestrator.cli.python.jobs": ("Job", "load_job"),
    "orchestrator.cli.python.searches": (
        "plan", "run", "resume", "load_search", "SearchPlan", "SearchResult", "BestTrial", "Report",
    ),
    "orchestrator.cli.python.prompts": ("load", "RegisteredPrompt", "Evaluation"),
    "orchestrator.errors": (
        "OrchestratorError", "BadInput", "SpecError", "Problem", "Unreachable", "JobFailed",
        "NothingFound", "SearchLost", "Interrupted",
    ),
}  # fmt: skip
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    """List the public names too, for completion in a shell."""
    return sorted({*globals(), *__all__})
