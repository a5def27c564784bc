"""The type of the JSON documents that are printed, sent and stored."""

from __future__ import annotations

from typing import Any, TypeAlias

JsonObject: TypeAlias = dict[str, Any]
"""A JSON object whose keys its own documentation names."""
