"""A fixture for job files."""

from __future__ import annotations

from pathlib import Path

import pytest
from job_texts import Files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Return a place for job files."""
    return Files(tmp_path)
