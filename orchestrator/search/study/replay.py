"""Restore the state of a search's population from the search's history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.job.spec import JobSpec
from orchestrator.search.state.history import History
from orchestrator.search.study.population import CopyDecision, Population


def replayed(
    job: JobSpec, history: History, left: Sequence[str]
) -> tuple[Population | None, dict[str, CopyDecision]]:
    """Return the population after the history's reports, and its decisions for ``left`` trials.

    Both are empty for a search without a population, or one that has not begun.
    """
    if job.search.scheduler != "pbt" or not history.events:
        return None, {}
    population = Population(job)
    specs = history.first_specs()
    for report in history.reports:
        if report.copied is not None:
            specs[report.trial] = report.copied.spec
        if population.compares(report):
            whole = replace(report, checkpoint=history.checkpoint_at(report.trial, report.step))
            population.add(whole, specs[report.trial])
    last = {report.trial: report for report in history.reports}
    compared = {
        trial: last[trial].step
        for trial in left
        if trial in last and population.compares(last[trial])
    }
    copies = {trial: population.copy(trial, step) for trial, step in compared.items()}
    return population, {trial: copy for trial, copy in copies.items() if copy is not None}
