"""RelayTrial, which stands between Tune and the broker."""

from __future__ import annotations

import threading
from typing import Any

import ray

from orchestrator.job.space import TrialSpec
from orchestrator.search.study.study import STOPPED, RelayTrial
from orchestrator.search.workers.broker import Broker


def asked(number: int) -> dict[str, Any]:
    return {"trial": {"number": number, "spec": TrialSpec("random", None, 2, 0.1, number)}}


def relay(broker: Any, number: int) -> RelayTrial:
    made: RelayTrial = RelayTrial.__new__(
        RelayTrial
    )  # Tune's own part of the constructor is not needed
    made.setup(asked(number), broker=broker)
    return made


def test_a_process_that_comes_too_late_for_its_trial_does_not_end_it(ray_cluster: None) -> None:
    """A relay that starts after another has taken its trial leaves that trial alone.

    While a relay process starts, Tune may reuse a free one for its trial. The late relay stays idle
    until it is given another trial.
    """
    broker = ray.remote(Broker).remote(3)
    ray.get(
        broker.worker_places.remote()
    )  # wait until the broker is up, so that later calls are quick
    free = relay(broker, 1)
    free.reset_config(asked(0))
    heard: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: heard.append(free.step()), daemon=True)
    waiting.start()
    waiting.join(1.0)  # long enough for the call to reach the broker
    late = relay(broker, 0)
    waiting.join(1.0)
    assert waiting.is_alive() and heard == []
    late.reset_config(asked(2))
    ray.get(broker.decide.remote("t000", False))
    waiting.join(30.0)
    assert heard == [STOPPED]
    ray.kill(broker)
