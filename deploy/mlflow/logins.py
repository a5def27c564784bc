"""Create logins for programs, or change their passwords: ``python logins.py tuning serving``.

Passwords are read from LOGIN_TUNING, LOGIN_SERVING and so on, the server's address from
MLFLOW_TRACKING_URI, and the administrator's login from MLFLOW_TRACKING_USERNAME and
MLFLOW_TRACKING_PASSWORD. A login that exists gets the password, so running this again is harmless.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def main(names: list[str]) -> int:
    missing = [
        it for it in ("MLFLOW_TRACKING_URI", *map(variable, names)) if not os.environ.get(it)
    ]
    if missing or not names:
        print(f"not set: {', '.join(missing)}" if names else __doc__, file=sys.stderr)
        return 2
    from mlflow.server import get_app_client

    client = get_app_client("basic-auth", os.environ["MLFLOW_TRACKING_URI"])
    for name in names:
        print(f"{name}: {renew(client, name, os.environ[variable(name)])}")
    return 0


def variable(name: str) -> str:
    return f"LOGIN_{name.upper()}"


def renew(client: Any, name: str, password: str) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_user(name, password)
        return "made"
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    client.update_user_password(name, password)
    return "has its password"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
