"""An alias of ``remote_home`` that ``run-or-resume`` of earlier container images imports."""

from orchestrator.search.state.object_store_copy import remote_home

__all__ = ["remote_home"]
