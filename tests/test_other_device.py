"""The engines on a device other than the CPU: tensors are in place and results are right.

The tests of the results run here again, in a process whose models are on another device. On a
machine with CUDA they run there too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
SELECTED = {
    "training": [
        "tuning/test_engine.py",
        "tuning/test_step.py",
        "tuning/test_generate.py",
        "tuning/test_evaluate.py",
    ],
    "methods": ["test_methods_contract.py"],
    "serving": [
        f"serving/test_serving_{name}.py"
        for name in ("engine", "iterations", "methods", "cache", "store")
    ],
}
ONLY = {
    "training": "test",
    "methods": (
        "(packed or resumed or share_a_forward) and (llama or gpt2 or mistral or t5 or bert)"
    ),
    # MLflow's model is stored in files, and only torch's own tensor types can be saved.
    "serving": "not mlflows_model",
}

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


@pytest.mark.parametrize("device", ["away", *(["cuda"] if torch.cuda.is_available() else [])])
@pytest.mark.parametrize("part", SELECTED)
def test_on_another_device(part: str, device: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *SELECTED[part],
        "-k",
        ONLY[part],
        "-m",
        "not ray and not long",
        "-v",
    ]
    options = ["-p", "no:cacheprovider", "--durations=0"]
    ran = subprocess.run(
        [*command, *options],
        cwd=TESTS,
        env={**os.environ, "TEST_DEVICE": device},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-20_000:]
    found = re.search(r"(\d+) passed", ran.stdout)
    assert found and int(found[1]) > 20
