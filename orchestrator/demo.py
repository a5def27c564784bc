"""Run ``python -m orchestrator.demo``, the same as ``orchestrator demo``."""

import sys

from orchestrator.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())
