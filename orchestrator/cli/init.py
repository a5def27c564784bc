"""Files that ``orchestrator init`` writes: a job spec and rows that run unchanged."""

from __future__ import annotations

import shlex
from importlib.resources import files
from pathlib import Path

from orchestrator.errors import BadInput

JOB = "job.yaml"
STARTER = (JOB, "train.csv")


def starter_file(name: str) -> bytes:
    """Read a file of the package's ``starter`` folder."""
    return (files("orchestrator.cli") / "starter" / name).read_bytes()


def write_starter(folder: Path) -> list[Path]:
    """Write the job spec and its rows into the folder, which is created if it is missing.

    Raises BadInput if one of the files exists already, or if the folder can't be written to.
    """
    targets = [folder / name for name in STARTER]
    present = [str(target) for target in targets if target.exists() or target.is_symlink()]
    if present:
        verb = "exists" if len(present) == 1 else "exist"
        raise BadInput(
            f"{' and '.join(present)} {verb} already, and nothing was written",
            "name another folder: orchestrator init DIR",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for target in targets:
            with target.open("xb") as file:
                file.write(starter_file(target.name))
    except OSError as error:
        raise BadInput(
            f"{error.filename or folder}: {error.strerror or error}",
            "name a folder that you may write to: orchestrator init DIR",
        ) from None
    return targets


def next_steps(folder: Path) -> list[str]:
    """Return the commands to run next, which start by changing into the folder."""
    inside = folder.resolve() == Path.cwd().resolve()
    steps = [] if inside else [f"cd {shlex.quote(str(folder))}"]
    return [*steps, f"orchestrator validate {JOB}", f"orchestrator run {JOB}"]
