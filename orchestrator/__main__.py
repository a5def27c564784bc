"""``python -m orchestrator`` is the same as ``orchestrator``."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # a cluster's Python is not the one that the package was installed with
    message = "bad input: Python 3.11 or newer is needed, and this is " + sys.version.split()[0]
    sys.stderr.write(message + "\n")
    sys.exit(2)

from orchestrator.cli import main

main()
