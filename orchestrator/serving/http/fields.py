"""Errors about single fields of a request body."""

from __future__ import annotations

import json

from pydantic_core import PydanticCustomError


def field_error(field: str, message: str) -> PydanticCustomError:
    """Build the error of a field that can't be taken; the message follows the field's name."""
    if not field.isprintable() or len(field) > 100:
        field = json.dumps(field[:100])
    context = {"field": field, "quoted": repr(field), "message": message}
    return PydanticCustomError("field", "{quoted} {message}", context)
