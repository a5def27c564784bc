"""Read a job spec from YAML and report every problem at once, each with its place.

``yaml_text`` and ``tree`` turn the text into values that remember where they stand, ``overrides`` lays ``--set`` over
them, ``explain`` compares them with the models of ``spec``, and ``words`` says what it found.
"""

from __future__ import annotations

from orchestrator.job.yaml.load import load_job, load_with_places
from orchestrator.job.yaml.places import Places
from orchestrator.job.yaml.scalars import write

__all__ = ["Places", "load_job", "load_with_places", "write"]
