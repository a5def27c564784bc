"""What every step of a search needs."""

from __future__ import annotations

from dataclasses import dataclass, field

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import JobSpec
from orchestrator.registry import Registry, SearchLog
from orchestrator.search.plan.plan import Plan
from orchestrator.search.prepare import Prepared
from orchestrator.search.progress import Clock, Progress
from orchestrator.search.state.folder import SearchFolder
from orchestrator.search.state.history import History
from orchestrator.search.state.recorder import Recorder
from orchestrator.search.state.saved import SavedSearch
from orchestrator.search.state.trials import trial_id
from orchestrator.search.workers.placement import Placement
from orchestrator.search.workers.running import Running


@dataclass
class SearchContext:
    """A search on a cluster: its inputs, its place, and what earlier attempts left behind."""

    prepared: Prepared
    pins: dict[str, str]
    """The registered versions that trials start from, by the reference in the spec."""
    registry: Registry
    folder: SearchFolder
    progress: Progress
    clock: Clock
    placement: Placement
    local_ray: bool
    """Whether Ray was started by this search and for it alone."""
    saved: SavedSearch | None = None
    """The identity of a search that is resumed."""
    history: History = field(default_factory=History)
    plan: Plan | None = None

    @property
    def job(self) -> JobSpec:
        return self.prepared.job

    @property
    def id(self) -> str:
        return self.folder.id

    @property
    def trials(self) -> list[tuple[str, TrialSpec]]:
        """The trials known in advance, each with its id."""
        return [(trial_id(number), spec) for number, spec in enumerate(self.prepared.trials)]


@dataclass(frozen=True)
class StartedSearch:
    """A search whose MLflow run is open and whose workers are up. See ``search.start``."""

    context: SearchContext
    log: SearchLog
    workers: Running
    recorder: Recorder
