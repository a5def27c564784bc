"""Job files for tests, good and bad."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from orchestrator.errors import Problem, SpecError
from orchestrator.job.spec import JobSpec
from orchestrator.job.yaml import load_job

GOOD = """\
name: sms-spam
base_model:
  id: builtin:quickstart
data:
  path: ucirvine/sms_spam
  template: "{text}\\nSpam or not?"
  target: label
  verbalizer: {0: " ham", 1: " spam"}
search:
  space:
    learning_rate: 0.1
train:
  steps: 100
"""

BAD = """\
name: has spaces
base_model:
  idd: Qwen/Qwen2.5-0.5B
  dtype: float23
data:
  path: a.jsonl
  template: Spam or not?
  verbalizer:
    0: 7
    .inf: half
  limit:
search:
  space:
    init: [random, clas_labels]
    num_virtual_tokens: [5, "20"]
    learning_rate:
      loguniform: [0.5, 0.003]
  trials: true
  metric: loss
  mode: max
registry:
  alias: v3
"""


def swap(old: str, new: str) -> str:
    """Return GOOD with one part replaced."""
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


class Files:
    """Job files in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "job.yaml"

    def load(self, text: str | bytes, overrides: Sequence[str] = ()) -> JobSpec:
        """Load the job spec in ``text``."""
        self.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_job(self.path, overrides)

    def problems(self, text: str | bytes, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
        """Return the problems of ``text``; fail if there are none."""
        with pytest.raises(SpecError) as caught:
            self.load(text, overrides)
        return caught.value.problems

    def problem(self, text: str | bytes, overrides: Sequence[str] = ()) -> Problem:
        """Return the only problem of ``text``."""
        problems = self.problems(text, overrides)
        assert len(problems) == 1, problems
        return problems[0]
