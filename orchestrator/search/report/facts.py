"""The contents of a report: the job, all trials' reports, the baselines, and the result, if any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.search.mixture import best_of_each
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.journal import read_events
from orchestrator.search.state.saved import load_saved
from orchestrator.search.state.trials import TrialRecord, ranked


@dataclass(frozen=True)
class SearchFacts:
    """A search as its folder keeps it.

    ``result`` is the document of ``run --json``, or None if the search has not finished.
    """

    id: str
    job: JobSpec
    run_id: str
    trials: list[TrialRecord]
    baselines: Mapping[str, Any]
    result: Mapping[str, Any] | None
    data_fingerprint: str = ""
    warnings: tuple[str, ...] = ()
    """Sentences on what makes the result less trustworthy."""

    @property
    def metric(self) -> str:
        return self.job.search.metric

    @property
    def size_name(self) -> str:
        """Name of the quantity that ``TrialSpec.size`` counts with the job's method."""
        if self.job.mixes:
            return "size"
        return {
            "lora": "rank",
            "qlora": "rank",
            "adapter": "bottleneck",
            "prompt_design": "demonstrations",
        }.get(self.job.methods[0], "tokens")

    def size_label(self, spec: TrialSpec, named: bool = True) -> str:
        """Make a label of a trial's size, with the method whose size it is in a mixed search."""
        if spec.method:
            return f"{spec.method.replace('_', ' ')} {spec.size:>4}"
        return f"{spec.size:>4} {self.size_name}" if named else f"{spec.size:>6}"

    @cached_property
    def scored(self) -> list[TrialRecord]:
        """Trials with a result, best first, as the search itself ranks them."""
        return ranked(self.trials, self.job.search)

    @property
    def best_of_each(self) -> dict[str, TrialRecord]:
        """The best trial of each method, best first; empty for a search of one method."""
        if not self.job.mixes:
            return {}
        named = {
            found["method"]: found["trial"] for found in (self.result or {}).get("methods", ())
        }
        known = {trial.id: trial for trial in self.trials}
        best = {method: known[trial] for method, trial in named.items() if trial in known}
        return best or best_of_each(self.scored)

    @property
    def winner(self) -> TrialRecord | None:
        """The best trial of the result, or the best so far; None if none has been evaluated."""
        named = (self.result or {}).get("best", {}).get("trial")
        return next(
            (it for it in self.trials if it.id == named), self.scored[0] if self.scored else None
        )


def read_facts(folder: SearchFolder) -> SearchFacts:
    """Read the facts of a search, finished or not, from its folder.

    Raises BadInput for a folder without a search.
    """
    saved, job = load_saved(folder)
    history = read_events(folder)
    trials = list(history.outcome().records.values())
    baselines = history.found("baselines")
    result = json.loads(folder.result.read_bytes()) if folder.result.is_file() else None
    warnings = tuple((result or {}).get("warnings", saved.warnings))
    return SearchFacts(
        id=folder.id,
        job=job,
        run_id=saved.run_id,
        trials=trials,
        baselines=baselines.value if baselines else {},
        result=result,
        data_fingerprint=saved.data_fingerprint,
        warnings=warnings,
    )


def init_label(spec: TrialSpec) -> str:
    """Make a short label of the init, or of a written prompt's wording or demonstrations."""
    text = spec.init_text or spec.init_artifact or spec.template
    if text is None:
        return spec.init or (spec.demonstrations if spec.shots else "") or ""
    words = " ".join(text.split())
    return f"\u201c{words if len(words) <= 18 else words[:17] + '…'}\u201d"
