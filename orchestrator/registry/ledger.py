"""Moves of aliases, one after another: nobody overwrites another's move without knowing it.

MLflow moves an alias without comparing, and tags are overwritten. A run's parameter is the one thing that it writes
only once: of two programs that write the same one at once, one is refused, in SQLite, in PostgreSQL and behind a
server. So each registered model has a run whose parameters are its aliases' history, and writing the next number is
winning it. The alias follows; whoever moves it sets it to the history's end until the end stays what it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import BadInput, JobFailed
from orchestrator.registry.history import Kind, Move, read_moves
from orchestrator.registry.refs import printable
from orchestrator.registry.searches import HISTORY_EXPERIMENT, experiment_named, refuse_deleted_run
from orchestrator.registry.store import Store

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

LEDGER_TAG = "orchestrator.alias_history"
"""On a registered model: the run whose parameters are its aliases' history."""
SETTLE_SECONDS = 3.0  # how long an alias may differ from its history's end while another program is moving it
AGREE_SECONDS = 0.5
ATTEMPTS = 20  # as many movers at once get their turn


class Overtaken(JobFailed):
    """Somebody else moved the alias in this very moment."""


@dataclass(frozen=True)
class Ledger:
    """The history of one registered model's aliases."""

    store: Store
    name: str
    run_id: str

    def moves(self) -> list[Move]:
        """Every move, oldest first. BadInput when the run that holds them was deleted."""
        run = self.store.client.get_run(self.run_id)
        refuse_deleted_run(self.store, run, f"the history of {printable(self.name)}'s aliases")
        return read_moves(run.data.params)

    def is_usable(self, may_write: bool) -> bool:
        """Tell whether the run is there at all. Raises BadInput for one that is in the trash or can't be written.

        ``may_write`` tries the permission by writing a tag as it stands.
        """
        run = find_run(self.store, self.run_id)
        if run is None:
            return False
        refuse_deleted_run(self.store, run, f"the history of {printable(self.name)}'s aliases")
        if may_write:
            self.store.client.set_tag(self.run_id, "orchestrator.model", self.name[:5000])
        return True

    def last(self, alias: str) -> Move | None:
        return next((move for move in reversed(self.moves()) if move.alias == alias), None)

    def claim(self, move: Move) -> bool:
        """Write the entry, unless somebody else has written that number; True when it is ours."""
        from mlflow.exceptions import MlflowException

        try:
            self.store.client.log_param(self.run_id, move.key, move.text())
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return False
        # A server that answers late may have written somebody else's: what counts is what is there.
        return any(found.id == move.id for found in self.moves())


def new_ledger(store: Store, name: str) -> str:
    """The run of a new history."""
    experiment = experiment_named(store, HISTORY_EXPERIMENT)
    note = f"Parameters: every move of an alias of `{printable(name)[:200]}`, in order. MLflow writes them only once."
    tags = {"orchestrator.model": name[:5000], "mlflow.note.content": note}
    run = store.client.create_run(experiment.experiment_id, tags=tags, run_name=f"aliases of {printable(name)[:200]}")
    store.client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def open_ledger(store: Store, model: RegisteredModel) -> Ledger:
    """The model's history; a model that another program made gets one with its first move, as does one whose
    history was purged from MLflow's trash."""
    run_id = model.tags.get(LEDGER_TAG)
    if not run_id or find_run(store, run_id) is None:
        store.client.set_registered_model_tag(model.name, LEDGER_TAG, new_ledger(store, model.name))
        time.sleep(AGREE_SECONDS)  # two programs may both do this: the last one to write the tag is what both go by
        run_id = store.client.get_registered_model(model.name).tags[LEDGER_TAG]
    return Ledger(store, model.name, run_id)


def find_run(store: Store, run_id: str) -> Run | None:
    """Read a run; None for one that MLflow no longer knows, not even in its trash."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def recorded(store: Store, model: RegisteredModel) -> list[Move]:
    """The moves on record, oldest first; none for a model that has no history, or whose history is gone."""
    from mlflow.exceptions import MlflowException

    if not (run_id := model.tags.get(LEDGER_TAG)):
        return []
    with suppress(MlflowException, BadInput):
        return Ledger(store, model.name, run_id).moves()
    return []


Check = Callable[[int | None], str]
"""Looks at the alias's holder and returns the reason of the move; raises when it must not be."""


def move_alias(store: Store, name: str, alias: str, version: int, kind: Kind, check: Check) -> tuple[int | None, str]:
    """Put the alias on the version when ``check`` lets it; returns the former holder and the reason.

    When somebody else moves the alias meanwhile, the check is made again with the new holder. Overtaken when that
    happens ATTEMPTS times.
    """
    for _ in range(ATTEMPTS):
        ledger, holder, number = _settled(store, name, alias)
        reason = check(holder)
        if holder == version:
            return holder, reason
        move = Move(alias, number, holder, version, kind, reason)
        if ledger.claim(move) and _carry_out(ledger, move):
            return holder, reason
    raise Overtaken(
        f"alias {printable(alias)} of {printable(name)} is being moved by others all the time",
        f"see who: orchestrator models {printable(name)}",
    )


def _settled(store: Store, name: str, alias: str) -> tuple[Ledger, int | None, int]:
    """The history, the alias's holder, and the number of the next move; the two agree.

    An alias that stays different from its history's end was moved by something that keeps no history, MLflow's pages
    for instance, or by a program that was killed in between: what is there counts, and is put on record.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        model = store.client.get_registered_model(name)
        ledger = open_ledger(store, model)
        last = ledger.last(alias)
        here = store.client.get_registered_model(name).aliases.get(alias)
        holder = int(here) if here is not None else None
        number = last.number + 1 if last else 1
        if last is None or last.new == holder:
            return ledger, holder, number
        if time.monotonic() > deadline and ledger.claim(Move(alias, number, last.new, holder, "elsewhere")):
            return ledger, holder, number + 1
        time.sleep(0.05)


def _carry_out(ledger: Ledger, move: Move) -> bool:
    """Set the alias to the end of its history, until that end stays. False when somebody took the move for one that
    was given up, because it took so long: then it did not happen. A move that fails is taken back."""
    client = ledger.store.client
    end = move
    try:
        while True:
            if end.new is not None:
                client.set_registered_model_alias(ledger.name, end.alias, str(end.new))
            moves = [it for it in ledger.moves() if it.alias == move.alias]
            if moves[-1] == end:
                break
            end = moves[-1]
    except Exception as error:
        _take_back(ledger, move, error)
        raise
    with suppress(Exception):  # for whoever reads MLflow's page
        client.set_registered_model_tag(ledger.name, f"alias.{move.alias}", end.sentence())
    after = next((it for it in moves if it.number == move.number + 1), None)
    return after is None or after.kind != "elsewhere"


def _take_back(ledger: Ledger, move: Move, error: Exception) -> None:
    with suppress(Exception):
        if ledger.store.client.get_registered_model(ledger.name).aliases.get(move.alias) != str(move.new):
            reason = f"taken back, it could not be carried out: {error}"
            ledger.claim(Move(move.alias, move.number + 1, move.new, move.old, "rollback", reason))
