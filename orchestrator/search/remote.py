"""The name under which earlier images' ``run-or-resume`` imports the store's searches."""

from orchestrator.search.state.object_store_copy import remote_home

__all__ = ["remote_home"]
