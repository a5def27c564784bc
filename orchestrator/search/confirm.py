"""Train the best configurations of a search again under fresh seeds, after its trials."""

from __future__ import annotations

from orchestrator.job.space import fresh_seeds
from orchestrator.search.context import StartedSearch
from orchestrator.search.state.confirmation import confirming_trials, top_configurations
from orchestrator.search.state.events import Listener
from orchestrator.search.state.trials import Outcome
from orchestrator.search.tracking import CONFIRMATION
from orchestrator.utils.wording import counted


def confirm_best(search: StartedSearch, outcome: Outcome) -> None:
    """Train the configurations of ``search.confirm`` again; ``outcome`` learns of their trials.

    The choice of configurations is recorded before any of them is trained, so a resumed search
    goes on with the same ones.
    """
    context, settings = search.context, search.context.job.search
    if settings.confirm is None:
        return
    search.recorder.flush()  # the journal has every trial of the search before the choice
    if known := context.history.found(CONFIRMATION):
        first_runs = [outcome.records[name] for name in known.value]
    else:
        first_runs = top_configurations(outcome.records.values(), settings)
        search.recorder.found(CONFIRMATION, [trial.id for trial in first_runs])
    if not first_runs:
        return  # no trial has a result, which the evaluation of the best reports
    names = ", ".join(trial.id for trial in first_runs)
    seeds = ", ".join(map(str, fresh_seeds(settings)))
    what = counted(len(first_runs), "configuration")
    context.progress.note(f"confirming the best {what} ({names}) under seeds {seeds}")
    trials = confirming_trials(first_runs, settings)
    listeners: list[Listener] = [outcome, search.recorder, context.progress]
    search.workers.confirm(trials, listeners, context.history)
