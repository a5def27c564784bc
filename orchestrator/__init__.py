"""Search, register and serve soft prompts for one frozen language model."""

import os

# Read once, when torch is first imported. OpenMP threads that spin while they wait for each other stall for whole time
# slices on a machine that runs anything else, and here several processes always run (docs/decisions.md: 30 times).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
