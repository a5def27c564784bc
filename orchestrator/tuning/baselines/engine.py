"""The tuning engines for baselines: one trial at a time.

While a trial trains and is evaluated, its change is part of the model. Loss, data order, updates,
evaluation and reports are the same as for prompts, with no prompt in front of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from orchestrator.data.designs import Design
from orchestrator.errors import JobFailed
from orchestrator.job.space import TrialSpec
from orchestrator.tuning.baselines import WeightChange, make_change
from orchestrator.tuning.checkpoint import Checkpoint
from orchestrator.tuning.engine import Engine, Slot
from orchestrator.tuning.reports import Ending, EvaluationJob, Report


class BaselineEngine(Engine):
    """An engine that trains a change of the model: all weights, LoRA layers or adapters."""

    def _learned(self, spec: TrialSpec) -> WeightChange:
        return make_change(self.task.method.name, spec, self.backbone)

    def _own_gradients(self, slots: Sequence[Slot], rows: Sequence[Sequence[int]]) -> list[float]:
        (slot,) = slots
        with self._dropout(slot), _change(slot).applied():
            return self._packed(None, rows, list(slot.prompt.parameters()))

    def _slot_metrics(self, slots: Sequence[Slot]) -> list[dict[str, float] | None]:
        (slot,) = slots
        with _change(slot).applied():
            return self._metrics(None, self.task.splits["validation"])

    def _checkpoint_metrics(self, job: EvaluationJob, state: Checkpoint) -> dict[str, float] | None:
        change = self._learned(_spec(job))
        change.load(state.best())
        with change.applied():
            return self._metrics(None, self.task.splits[job.split], job.confusion)[0]


class Written(WeightChange):
    """The change of a written prompt: none, since nothing is learned."""

    def __init__(self) -> None:
        super().__init__({})

    def _put_in(self) -> None: ...

    def _take_out(self) -> None: ...


class DesignEngine(Engine):
    """An engine that evaluates written prompts, each once and without training."""

    def _learned(self, spec: TrialSpec) -> WeightChange:
        return Written()

    def step(self, slots: Sequence[Slot]) -> None:
        """Do nothing: a written prompt has nothing to train."""

    @staticmethod
    def _runs(slot: Slot, target: int) -> bool:
        return False

    def _slot_metrics(self, slots: Sequence[Slot]) -> list[dict[str, float] | None]:
        return [self._design_metrics(slot.spec, "validation") for slot in slots]

    def _checkpoint_metrics(self, job: EvaluationJob, state: Checkpoint) -> dict[str, float] | None:
        return self._design_metrics(_spec(job), job.split, job.confusion)

    def _design_metrics(
        self, spec: TrialSpec, split: str, confusion: bool = False
    ) -> dict[str, float] | None:
        design, designs = Design.of(spec), self.task.designs
        assert designs is not None  # set when a job of this method is prepared
        task = self.task
        self.task = replace(task, encoder=designs.encoder(design))
        try:
            return self._metrics(None, designs.encoded(design, split), confusion)[0]
        finally:
            self.task = task

    def _report(self, slot: Slot, metrics: dict[str, float]) -> Report:
        report = super()._report(slot, metrics)
        shown_count = 0.0
        if self.task.designs:
            shown_count = self.task.designs.shown(Design.of(slot.spec), "validation")
        if slot.spec.shots and shown_count < slot.spec.shots:
            text = f"the context has room for {shown_count:.3g} of {slot.spec.shots} demonstrations"
            return replace(report, note="; ".join(filter(None, [report.note, text])))
        return report

    def _ending(self, slot: Slot) -> Ending | None:
        return super()._ending(slot) or "evaluated"

    def _stored_bytes(self, slot: Slot) -> int:
        return self.task.designs.stored_bytes(Design.of(slot.spec)) if self.task.designs else 0


def _change(slot: Slot) -> WeightChange:
    assert isinstance(slot.prompt, WeightChange)
    return slot.prompt


def _spec(job: EvaluationJob) -> TrialSpec:
    if job.spec is None:
        raise JobFailed(
            "a baseline's checkpoint can't be evaluated without its trial's configuration"
        )
    return job.spec
