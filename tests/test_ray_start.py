"""What a Ray that does not start says."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from orchestrator.cluster.session import ray_session
from orchestrator.errors import Unreachable

REASONS = (Exception("The current node timed out during startup."), RuntimeError("no port is free"))


@pytest.mark.parametrize("reason", REASONS, ids=["plain exception", "runtime error"])
def test_a_ray_that_does_not_start_is_unreachable(
    reason: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray raises even a plain Exception when its processes start too slowly."""

    def failing(*arguments: Any, **options: Any) -> None:
        raise reason

    monkeypatch.setattr(ray, "init", failing)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(Unreachable, match=str(reason)) as caught, ray_session():
        pass
    assert "did not start on this machine" in caught.value.message
    assert "--address" in caught.value.hint
