"""Read a job spec from YAML and report every problem at once, each with its place.

``yaml_text`` and ``tree`` turn the text into values that remember where they stand, ``overrides`` lays ``--set`` over
them, ``explain`` compares them with the models of ``spec``, and ``words`` says what it found.
"""

from __future__ import annotations

from .load import load_job, load_with_places
from .places import Places
from .yaml_text import write

__all__ = ["Places", "load_job", "load_with_places", "write"]
