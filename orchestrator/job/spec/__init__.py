"""The job spec: what a user writes in YAML, as frozen, strict models.

Each default is defined only here: the command line, the docs and the JSON schema read it from these
models. This module imports neither torch nor Ray. ``orchestrator.job.yaml`` reads a YAML file into
these models and reports problems with line numbers.
"""

from orchestrator.job.spec.base import (
    ALIAS_PATTERN,
    AUTO,
    BEGUN,
    BUILTIN,
    NAME_PATTERN,
    QUICKSTART,
    RESERVED_ALIAS,
    Conflict,
    Section,
    looks_like_path,
)
from orchestrator.job.spec.base_model import BaseModelSpec
from orchestrator.job.spec.data import (
    BARE_TEMPLATE,
    COMPLETION,
    CONTINUATION,
    PREFIX,
    PROMPT,
    ChatSpec,
    CsvSpec,
    DataFiles,
    DataSpec,
    RowLimits,
    SpecialTokens,
)
from orchestrator.job.spec.generation import GenerationSpec
from orchestrator.job.spec.job import JobSpec, job_schema
from orchestrator.job.spec.methods import (
    BASELINES,
    PROMPT_METHODS,
    PROMPT_SPACE,
    SPACES,
    MethodName,
    ReparameterizationSpec,
)
from orchestrator.job.spec.registry import PromoteIf, RegistrySpec
from orchestrator.job.spec.resources import ResourcesSpec
from orchestrator.job.spec.search import (
    DEFAULT_TRIALS,
    MAX_TRIALS,
    Scheduler,
    Searcher,
    SearchSpec,
    StopSpec,
)
from orchestrator.job.spec.space import (
    BASELINE_SPACE,
    DIMENSIONS,
    ArtifactInit,
    Init,
    LogUniform,
    MethodSpace,
    NamedInit,
    SampleVocabInit,
    SpaceSpec,
    TextInit,
    Uniform,
)
from orchestrator.job.spec.template import BLANK, FIELD, VIRTUAL, template_columns
from orchestrator.job.spec.train import DEFAULT_BETAS, Optimizer, Schedule, TrainSpec

__all__ = [
    "ALIAS_PATTERN",
    "AUTO",
    "ArtifactInit",
    "BARE_TEMPLATE",
    "BASELINES",
    "BEGUN",
    "BLANK",
    "BUILTIN",
    "BaseModelSpec",
    "COMPLETION",
    "CONTINUATION",
    "ChatSpec",
    "Conflict",
    "CsvSpec",
    "DEFAULT_BETAS",
    "DEFAULT_TRIALS",
    "DataFiles",
    "DIMENSIONS",
    "DataSpec",
    "FIELD",
    "GenerationSpec",
    "Init",
    "JobSpec",
    "BASELINE_SPACE",
    "LogUniform",
    "MAX_TRIALS",
    "MethodName",
    "MethodSpace",
    "NAME_PATTERN",
    "NamedInit",
    "Optimizer",
    "PREFIX",
    "PROMPT",
    "PROMPT_METHODS",
    "PROMPT_SPACE",
    "PromoteIf",
    "QUICKSTART",
    "RESERVED_ALIAS",
    "RegistrySpec",
    "ReparameterizationSpec",
    "ResourcesSpec",
    "RowLimits",
    "SPACES",
    "SampleVocabInit",
    "Schedule",
    "Scheduler",
    "SearchSpec",
    "Searcher",
    "Section",
    "SpaceSpec",
    "SpecialTokens",
    "StopSpec",
    "TextInit",
    "TrainSpec",
    "Uniform",
    "VIRTUAL",
    "job_schema",
    "looks_like_path",
    "template_columns",
]
