"""Search, register and serve soft prompts for one frozen language model."""

import os

# OpenMP reads this once, when torch is first imported. OpenMP threads that spin while they wait for
# each other stall for whole time slices on a machine that runs anything else, and several of our
# processes always run at once. Measured: a factor of 30
# (docs/decisions/0001-threads-sleep.md).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
