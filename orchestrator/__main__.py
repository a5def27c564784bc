"""Run ``python -m orchestrator``, the same as the command ``orchestrator``."""

import sys

# A cluster's Python is not always the one that the package was installed with.
if sys.version_info < (3, 11):  # noqa: UP036
    message = "bad input: Python 3.11 or newer is needed, and this is " + sys.version.split()[0]
    sys.stderr.write(message + "\n")
    sys.exit(2)

from orchestrator.cli import main

main()
