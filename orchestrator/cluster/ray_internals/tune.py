"""A workaround that relies on the internals of Ray Tune. Checked on Ray 2.60."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# Names of the collections in which Tune lists environment variables to pass to its processes.
HANDED = ("DEFAULT_ENV_VARS", "ENV_VARS_TO_PROPAGATE")


@contextmanager
def plain_trials() -> Iterator[None]:
    """Keep Tune from passing environment variables to the processes that it starts meanwhile.

    In a Ray that was started here, all processes have the variables anyway. ``train`` explains what
    they cost.
    """
    from ray.tune.execution import class_cache

    before = {name: value for name, value in vars(class_cache).items() if name in HANDED}
    vars(class_cache).update({name: type(value)() for name, value in before.items()})
    try:
        yield
    finally:
        vars(class_cache).update(before)
