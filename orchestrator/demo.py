"""Run ``python -m orchestrator.demo``, the same as ``orchestrator demo``."""

import sys

from orchestrator.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["demo"]
    main()
