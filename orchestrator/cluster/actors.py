"""Types for calls of Ray's actors, whose handles tell mypy and editors nothing.

A class names the methods of an actor that other processes call:

    class CounterHandle:
        add = ActorMethod(Counter.add)

An actor's handle that is annotated as a ``CounterHandle`` has each call ``handle.add.remote(3)``
checked against ``Counter.add``, and ``get`` returns what ``Counter.add`` does. At run time all of
it is Ray's own.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

Arguments = ParamSpec("Arguments")
Value = TypeVar("Value")
Value_co = TypeVar("Value_co", covariant=True)


class Reference(Generic[Value_co]):
    """A type for Ray's ObjectRef: a value that is in the object store, or will be."""


class ActorMethod(Generic[Arguments, Value]):
    """A type for the method of an actor's handle that calls ``method`` in the actor's process."""

    @overload
    def __init__(
        self, method: Callable[Concatenate[Any, Arguments], Coroutine[Any, Any, Value]]
    ) -> None: ...

    @overload
    def __init__(self, method: Callable[Concatenate[Any, Arguments], Value]) -> None: ...

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method = method

    def remote(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Reference[Value]:
        """Call the method and return a reference to its answer, as Ray's handle does."""
        raise TypeError(f"{self.method.__qualname__} is called on the handle of an actor only")


@overload
def get(reference: Reference[Value], timeout: float | None = None) -> Value: ...


@overload
def get(reference: Sequence[Reference[Value]], timeout: float | None = None) -> list[Value]: ...


def get(
    reference: Reference[Value] | Sequence[Reference[Value]], timeout: float | None = None
) -> Value | list[Value]:
    """Wait for the value of a reference, or for those of several, as ``ray.get`` does."""
    import ray  # the broker is imported where there is no Ray, too

    value: Value | list[Value] = ray.get(reference, timeout=timeout)
    return value
