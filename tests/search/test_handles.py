"""The typed handles of this project's actors, which name the actors' methods."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from orchestrator.cluster.actors import ActorMethod
from orchestrator.search.workers.broker import Broker, BrokerHandle
from orchestrator.search.workers.model_files import ModelFiles, ModelFilesHandle

HANDLES = [(BrokerHandle, Broker), (ModelFilesHandle, ModelFiles)]


@pytest.mark.parametrize(("handle", "actor"), HANDLES)
def test_a_handle_has_the_methods_of_its_actor(handle: type[Any], actor: type[Any]) -> None:
    """Each public method of the actor stands in the handle under its own name."""
    methods = {
        name: method
        for name, method in inspect.getmembers(actor, inspect.isfunction)
        if not name.startswith("_")
    }
    named = {
        name: entry.method for name, entry in vars(handle).items() if isinstance(entry, ActorMethod)
    }
    assert named == methods


def test_only_a_handle_of_ray_calls_an_actor() -> None:
    """A method of the class that describes a handle refuses calls and names the actor's method."""
    with pytest.raises(TypeError, match=r"Broker\.started"):
        BrokerHandle.started.remote(1.0)
