"""The quickstart language model, made once on a machine and kept in the usual cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.models.builtin import quickstart_model


@pytest.fixture(scope="session")
def model_folder() -> Path:
    return quickstart_model()
