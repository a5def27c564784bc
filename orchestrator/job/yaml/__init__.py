"""Read a job spec from YAML and report every problem at once, each with its location.

``scalars`` and ``tree`` turn the text into values that remember where they stand. ``overrides``
applies ``--set`` to them, ``explain`` compares them with the models of ``spec``, and ``wording``
puts keys, values and what is allowed into words. ``places`` locates problems that are found after
reading. ``values`` reads a job spec from Python's values in the same way.
"""

from __future__ import annotations

from orchestrator.job.yaml.load import load_job, load_with_places
from orchestrator.job.yaml.places import Places
from orchestrator.job.yaml.scalars import write
from orchestrator.job.yaml.values import read_values

__all__ = ["Places", "load_job", "load_with_places", "read_values", "write"]
