"""Workers that train together end where one worker ends with the whole batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from group_processes import Case, Ended, Processes, ended

from orchestrator.prompts import Method
from orchestrator.spec import TrainSpec
from orchestrator.tuning.checkpoint import TrialState

TRAIN = TrainSpec(steps=4, batch_size=5, evaluate_every=2)
METHODS = {
    "prompt tuning": Method("prompt_tuning"),
    "inside": Method("prompt_tuning", inside=True),
    "prefix": Method("prefix_tuning"),
    "p-tuning": Method("p_tuning", "lstm"),
}


@pytest.fixture(scope="module", params=[2, 3], ids=["two", "three"])
def workers(request: pytest.FixtureRequest) -> Iterator[Processes]:
    processes = Processes(request.param)
    yield processes
    processes.close()


def assert_same(parts: list[Ended], wanted: Ended, rel: float = 1e-4) -> None:
    """Every worker's reports are those of one worker, and the leader's checkpoints too."""
    for part in parts:
        assert part.frozen
        assert part.bare == pytest.approx(wanted.bare, rel=rel)
        for name, reports in wanted.reports.items():
            got = part.reports[name]
            assert [(r.step, r.ending, r.best_step) for r in got] == [(r.step, r.ending, r.best_step) for r in reports]
            for one, other in zip(got, reports, strict=True):
                assert one.metrics == pytest.approx(other.metrics, rel=rel)
                assert one.train_loss == pytest.approx(other.train_loss, rel=rel)
    for name, reports in wanted.reports.items():
        found = [TrialState.from_bytes(one.checkpoint).tensors for one in (parts[0].reports[name][-1], reports[-1])]
        assert found[0].keys() == found[1].keys()
        for key, tensor in found[1].items():
            torch.testing.assert_close(found[0][key], tensor, rtol=rel, atol=rel * float(tensor.abs().max()))
        assert not any(report.checkpoint for part in parts[1:] for report in part.reports[name])


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "t5", "bart", "bert"])
def test_a_group_ends_where_one_worker_does(workers: Processes, family: str, method: str, sharded: bool) -> None:
    """Losses, metrics and prompts, whatever the family and the method; the frozen weights stay as they are."""
    case = Case(family, METHODS[method], TRAIN, sharded)
    assert_same(workers(ended, case), ended(case))
