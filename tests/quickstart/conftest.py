"""One quickstart language model for the session, from the usual cache: made once on a machine, not once a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.models.builtin import quickstart_model


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return quickstart_model()
