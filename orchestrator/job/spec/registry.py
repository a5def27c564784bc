"""The section ``registry``: how the best prompts are registered."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import AfterValidator, Field

from orchestrator.job.spec.base import RESERVED_ALIAS, Alias, Name, Section

PromoteIf: TypeAlias = Literal["better", "significantly_better"]


def _free_alias(alias: str) -> str:
    if RESERVED_ALIAS.match(alias):
        raise ValueError("is reserved by MLflow (latest, v1, v2, ...); choose another alias")
    return alias


class RegistrySpec(Section):
    """Registration of the best soft prompts."""

    model: Name | None = None
    """Name of the registered model; the search's name by default."""
    register_top: Annotated[int, Field(ge=0)] = 1
    """Number of the best trials to register; 0 registers none."""
    alias: Annotated[Alias, AfterValidator(_free_alias)] = "challenger"
    """Alias of the best new version. The version is promoted to champion when it beats the champion
    on the same test split."""
    promote_if: PromoteIf = "better"
    """What beating the champion takes: ``better`` asks for a better value of search.metric,
    ``significantly_better`` also for a difference that is more than noise (p < 0.05), by McNemar's
    test for accuracy and exact_match and by a paired bootstrap over the rows for other metrics. A
    version without a champion before it is promoted either way."""
