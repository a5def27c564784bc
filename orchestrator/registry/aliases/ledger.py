"""A ledger of alias moves, in order: nobody overwrites another's move without knowing it.

MLflow moves an alias without comparing, and its tags can be overwritten. A run's parameter is the
only value that MLflow writes just once: when two programs write the same parameter at the same
time, one of them is refused. This holds in SQLite, in PostgreSQL and behind a server. So each
registered model has a run whose parameters are the history of its aliases, and a program wins a
move by writing the next number. The alias follows: the program that moves it sets it to the
history's last entry, and repeats that until the last entry no longer changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.errors import BadInput, JobFailed
from orchestrator.registry.aliases.moves import Kind, Move, read_moves
from orchestrator.registry.runs.searches import (
    HISTORY_EXPERIMENT,
    experiment_named,
    refuse_deleted_run,
)
from orchestrator.registry.store import Store
from orchestrator.registry.versions.refs import printable

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import RegisteredModel

LEDGER_TAG = "orchestrator.alias_history"
"""A registered model's tag: the run whose parameters are the history of its aliases."""
SETTLE_SECONDS = 3.0
"""The time in which another program's move should reach the alias."""
AGREE_SECONDS = 0.5
ATTEMPTS = 20  # enough for as many programs that move an alias at once


class Overtaken(JobFailed):
    """Another program moved the alias at the same time."""


@dataclass(frozen=True)
class Ledger:
    """The history of one registered model's aliases."""

    store: Store
    name: str
    run_id: str

    def moves(self) -> list[Move]:
        """List every move, oldest first for each alias.

        Raises BadInput when the run that holds them was deleted.
        """
        run = self.store.client.get_run(self.run_id)
        refuse_deleted_run(self.store, run, f"the history of {printable(self.name)}'s aliases")
        return read_moves(run.data.params)

    def is_usable(self, may_write: bool) -> bool:
        """Tell whether the run exists.

        Raises BadInput for a run in MLflow's trash, and the store's error when the run can't be
        written. ``may_write`` tests the permission by writing a tag with the value that it has.
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
        """Write the entry unless another program has used its number; return True if it is ours."""
        from mlflow.exceptions import MlflowException

        try:
            self.store.client.log_param(self.run_id, move.key, move.text())
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            return False
        # A server that answers late may have written another program's entry, so read it back.
        return any(found.id == move.id for found in self.moves())


def new_ledger(store: Store, name: str) -> str:
    """Create the run of a new history and return its ID."""
    experiment = experiment_named(store, HISTORY_EXPERIMENT)
    note = (
        f"Parameters: every move of an alias of `{printable(name)[:200]}`, in order. "
        "MLflow writes them only once."
    )
    tags = {"orchestrator.model": name[:5000], "mlflow.note.content": note}
    run = store.client.create_run(
        experiment.experiment_id, tags=tags, run_name=f"aliases of {printable(name)[:200]}"
    )
    store.client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def open_ledger(store: Store, model: RegisteredModel) -> Ledger:
    """Return the model's history; create one where there is none.

    A model that another program created gets a history with its first move. So does a model whose
    history was purged from MLflow's trash.
    """
    run_id = model.tags.get(LEDGER_TAG)
    if not run_id or find_run(store, run_id) is None:
        store.client.set_registered_model_tag(model.name, LEDGER_TAG, new_ledger(store, model.name))
        # Two programs may both do this. Both wait, and then use the run that was written last.
        time.sleep(AGREE_SECONDS)
        run_id = store.client.get_registered_model(model.name).tags[LEDGER_TAG]
    return Ledger(store, model.name, run_id)


def find_run(store: Store, run_id: str) -> Run | None:
    """Read a run; return None for a run that is not even in MLflow's trash."""
    from mlflow.exceptions import MlflowException

    try:
        return store.client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def recorded(store: Store, model: RegisteredModel) -> list[Move]:
    """List the recorded moves, oldest first for each alias.

    The list is empty for a model whose history is missing or deleted.
    """
    from mlflow.exceptions import MlflowException

    if not (run_id := model.tags.get(LEDGER_TAG)):
        return []
    with suppress(MlflowException, BadInput):
        return Ledger(store, model.name, run_id).moves()
    return []


Check = Callable[[int | None], str]
"""Takes the alias's holder and returns the reason of the move; raises to prevent the move."""


def move_alias(
    store: Store, name: str, alias: str, version: int, kind: Kind, check: Check
) -> tuple[int | None, str]:
    """Move the alias to the version if ``check`` allows it.

    Returns the former holder and the reason. When another program moves the alias in the meantime,
    ``check`` is called again with the new holder. Raises Overtaken when that happens ATTEMPTS
    times.
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
    """Return the history, the alias's holder and the next move's number, once the first two agree.

    An alias that stays different from its history's last entry was moved by a program that keeps no
    history, such as MLflow's UI, or by one that was killed before it set the alias. The alias is
    then right: its holder is recorded as a move of kind "elsewhere".
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
        if time.monotonic() > deadline and ledger.claim(
            Move(alias, number, last.new, holder, "elsewhere")
        ):
            return ledger, holder, number + 1
        time.sleep(0.05)


def _carry_out(ledger: Ledger, move: Move) -> bool:
    """Set the alias to the last entry of its history, until that entry no longer changes.

    Returns False when this took so long that another program regarded the move as abandoned: the
    move then did not happen. A move that fails is taken back.
    """
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
    with suppress(Exception):  # only shown in MLflow's UI
        client.set_registered_model_tag(ledger.name, f"alias.{move.alias}", end.sentence())
    after = next((it for it in moves if it.number == move.number + 1), None)
    return after is None or after.kind != "elsewhere"


def _take_back(ledger: Ledger, move: Move, error: Exception) -> None:
    with suppress(Exception):
        if ledger.store.client.get_registered_model(ledger.name).aliases.get(move.alias) != str(
            move.new
        ):
            reason = f"taken back, it could not be carried out: {error}"
            ledger.claim(Move(move.alias, move.number + 1, move.new, move.old, "rollback", reason))
