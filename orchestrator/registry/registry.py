"""The Registry class: the only interface to MLflow for the rest of the program."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.artifact import DataRecord, read_manifest
from orchestrator.data.outcomes.rows import RowOutcomes
from orchestrator.data.source_row import Row
from orchestrator.errors import BadInput
from orchestrator.job.metrics import Better
from orchestrator.job.spec import ALIAS_PATTERN, NAME_PATTERN, RESERVED_ALIAS, PromoteIf
from orchestrator.registry.aliases import gate as promotion
from orchestrator.registry.aliases.canary import (
    CANARY_TAG,
    Canary,
    LiveModel,
    make_canary,
    read_canary,
)
from orchestrator.registry.aliases.gate import BETTER_TAG, METRIC_TAG, ComparedVersion, Verdict
from orchestrator.registry.aliases.ledger import Check, Overtaken, move_alias, recorded
from orchestrator.registry.aliases.moves import Kind, Move, former_holder
from orchestrator.registry.mlflow_internals.tables import ModelRow, read_models
from orchestrator.registry.runs import searches
from orchestrator.registry.runs.readiness import check_search_end
from orchestrator.registry.runs.search_log import SearchLog
from orchestrator.registry.store import SERVERS, Store, artifact_location
from orchestrator.registry.versions.description import version_description
from orchestrator.registry.versions.evaluations import EvaluationRecord, log_evaluations
from orchestrator.registry.versions.fetch import default_cache, fetch
from orchestrator.registry.versions.outcomes import OUTCOMES_TAG, read_outcomes
from orchestrator.registry.versions.publish import publish
from orchestrator.registry.versions.records import (
    CHAMPION_TAG,
    KIND,
    KIND_TAG,
    NEAREST_TAG,
    AliasOutcome,
    Metrics,
    ModelSummary,
    Promotion,
    UiCommand,
    VersionDetail,
    VersionSummary,
    version_summary,
)
from orchestrator.registry.versions.refs import (
    ModelRef,
    NoSuchVersion,
    parse_ref,
    printable,
    suggestion,
)
from orchestrator.utils.text import mask_secrets

if TYPE_CHECKING:
    from mlflow.entities.model_registry import RegisteredModel

CHAMPION = "champion"
PATIENCE_SECONDS = 60.0
PAGE = 1000  # MLflow's limit for one request
MAX_NEAREST = 100  # virtual tokens whose nearest words are stored


class Registry:
    """Searches, registered prompts and their aliases in one MLflow store.

    Constructing a Registry opens no connection. The first call connects and, for a new SQLite file,
    creates the schema. A Registry can be pickled and sent to other processes. Methods raise
    BadInput for names that don't exist and for refused requests, and Unreachable when MLflow does
    not answer.
    """

    def __init__(
        self,
        tracking_uri: str | None = None,
        registry_uri: str | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        """Set the addresses of the tracking store and of the registry.

        They default to MLFLOW_TRACKING_URI and MLFLOW_REGISTRY_URI. Without those, the tracking
        store is ./mlflow.db and the registry is the tracking store.
        """
        self._store = Store(tracking_uri, registry_uri)
        self.cache_dir = cache_dir or default_cache()

    @classmethod
    def connect(cls) -> Registry:
        """Open the registry that the environment names; Unreachable if MLflow does not answer."""
        registry = cls()
        registry.check()
        return registry

    def __reduce__(self) -> tuple[Any, ...]:
        return (Registry, (self._store.tracking_uri, self._store.registry_uri, self.cache_dir))

    @property
    def tracking_uri(self) -> str:
        """The full address, which may contain a password; show ``display_uri`` to users instead."""
        return self._store.tracking_uri

    @property
    def display_uri(self) -> str:
        return mask_secrets(self._store.tracking_uri)

    def check(self) -> None:
        """Raise Unreachable within about 10 s when MLflow does not answer."""
        self._store.check()

    def check_search_end(self, search: str, model: str | None) -> None:
        """Raise BadInput or Unreachable for anything that the end of a search would fail at.

        ``search`` names the experiment. ``model`` names the registered model, or is None for a
        search that registers nothing. The check leaves no test data behind; it may create the
        experiment that holds the aliases' history, which every registered model needs.
        """
        check_search_end(self._store, search, model, self.cache_dir)

    # Searches.

    def start_search(
        self,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        *,
        data: DataRecord | None = None,
        spill: Path | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> SearchLog:
        """Open a run for the search in the experiment of the same name.

        ``data`` describes the rows that the search uses. ``spill`` is the file for log entries that
        can't be written by the end of the search.
        """
        with self._store.translating(f"starting search {printable(name)}"):
            return searches.start(self._store, name, params, tags, data, spill, patience)

    def resume_search(
        self,
        parent_run_id: str,
        run_ids: Mapping[str, str] | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        spill: Path | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> SearchLog:
        """Continue logging into the run of an earlier search.

        MLflow knows the runs of the trials; ``run_ids`` adds to them. ``params`` are the search's
        parameters, which are logged where the first attempt was interrupted before it logged them.
        """
        with self._store.translating(f"resuming the search of run {printable(parent_run_id)}"):
            return searches.resume(
                self._store, parent_run_id, run_ids or {}, params or {}, spill, patience
            )

    def log_files(self, run_id: str, files: Mapping[str, bytes]) -> None:
        """Store files with a run; the keys are their paths among the run's artifacts."""
        with self._store.translating("logging files"), tempfile.TemporaryDirectory() as scratch:
            for path, content in files.items():
                file = Path(scratch, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            self._store.client.log_artifacts(run_id, scratch)

    # Registering versions.

    def register(
        self,
        artifact: Path,
        name: str,
        run_id: str,
        *,
        tags: Mapping[str, Any] | None = None,
        metric: str = "",
        better: Better | None = None,
        example: Row | None = None,
        nearest: Sequence[Sequence[tuple[str, float]]] = (),
        outcomes: RowOutcomes | None = None,
    ) -> int:
        """Publish the artifact as a new version of the registered model and return its number.

        The registered model is created if it doesn't exist yet. ``metric`` ranked the trials
        and improves in the direction ``better``, ``example`` is a row of the data, and ``nearest``
        has the words nearest to each virtual token. They help people who read or compare the
        version later. ``outcomes`` are those of the test rows, for the gate.
        """
        check_name(name)
        known = {METRIC_TAG: metric} if metric else {}
        known |= {BETTER_TAG: better} if better else {}
        known |= {NEAREST_TAG: json.dumps(nearest[:MAX_NEAREST])} if nearest else {}
        with self._store.translating(f"registering {name}"):
            manifest = read_manifest(artifact)
            description = version_description(manifest, name, self._champion(name), nearest)
            tested = manifest.data.test_fingerprint or manifest.data.fingerprint
            kept = {} if outcomes is None else {tested: outcomes}
            known |= {OUTCOMES_TAG: tested} if kept else {}
            all_tags = {**(tags or {}), **known}
            return publish(
                self._store, artifact, name, run_id, all_tags, description, example, kept
            )

    def _champion(self, name: str) -> VersionSummary | None:
        """Return the model's champion; None if the model or its champion does not exist."""
        try:
            return self.resolve(ModelRef(name, alias=CHAMPION))
        except BadInput:
            return None

    # Reading.

    def list_models(self) -> list[ModelSummary]:
        """List every registered model of the store, sorted by name.

        A known database is read with a few SQL statements. Other stores take one request per
        ``PAGE`` models. A champion whose metrics are not noted on its model takes one more request.
        Raises Unreachable within about 10 s when MLflow does not answer.
        """
        rows = read_models(self._store.registry_uri)
        if rows is None:
            self.check()
        with self._store.translating("listing the registered models"):
            found = self._asked() if rows is None else rows
            return sorted(map(self._summary, found), key=lambda it: it.name)

    def _summary(self, model: ModelRow) -> ModelSummary:
        metrics = None
        if (champion := model.aliases.get(CHAMPION)) is not None:
            metrics = _noted(model, champion)
            if metrics is None:  # another program moved the alias and left no note
                found = self._store.client.get_model_version(model.name, str(champion))
                metrics = version_summary(found, model.aliases).metrics
        return ModelSummary(
            model.name, model.newest, model.aliases, metrics, _is_prompt(model.tags)
        )

    def versions(self, name: str) -> list[VersionSummary]:
        """List every version of one registered model, newest first."""
        model = self._model(name)
        # A name may contain quotes, which a filter can't express. Then all versions are read.
        condition = f"name = '{name}'" if re.fullmatch(NAME_PATTERN, name) else None
        with self._store.translating(f"listing the versions of {printable(name)}"):
            pages = self._pages("search_model_versions", filter_string=condition)
            found = [it for it in pages if it.name == name]
        summaries = [version_summary(entity, _aliases(model)) for entity in found]
        return sorted(summaries, key=lambda it: it.version, reverse=True)

    def resolve(self, ref: ModelRef | str) -> VersionSummary:
        """Find the version that a reference means; a bare name means its champion.

        Raises BadInput, which lists the existing names, aliases or versions.
        """
        ref = parse_ref(ref) if isinstance(ref, str) else ref
        model = self._model(ref.name)
        if ref.version is not None:
            return self._version(model, ref.version)
        alias = ref.alias or CHAMPION
        aliases = _aliases(model)
        if alias not in aliases:
            raise BadInput(
                f"registered model {printable(ref.name)} has no alias {printable(alias)!r}",
                suggestion(alias, aliases) or self._known_versions(ref.name),
            )
        return self._version(model, aliases[alias])

    def version(self, ref: ModelRef | str) -> VersionDetail:
        """Read one version in full, including its manifest."""
        summary = self.resolve(ref)
        with self._store.translating(
            f"reading version {summary.version} of {printable(summary.name)}"
        ):
            source = self._store.client.get_model_version_download_uri(
                summary.name, str(summary.version)
            )
            try:
                return VersionDetail(summary, source, read_manifest(self._fetch(summary)))
            except BadInput as error:
                return VersionDetail(summary, source, None, error.message)

    def fetch(self, name: str, version: int, cache_dir: Path | None = None) -> Path:
        """Return the version's checked artifact as a local folder, downloaded once.

        Treat the folder as read-only.
        """
        summary = self._version(self._model(name), version)
        with self._store.translating(f"fetching version {version} of {printable(name)}"):
            return self._fetch(summary, cache_dir)

    def aliases(self, name: str) -> dict[str, int]:
        """Map each alias of one registered model to its version."""
        return _aliases(self._model(name))

    def snapshot(self) -> dict[str, dict[str, int]]:
        """Map each registered prompt to its aliases and their versions.

        Cheap enough for polling: a few SQL statements, or one request per ``PAGE`` models.
        """
        with self._store.translating("reading the aliases"):
            return {model.name: model.aliases for model in self._rows() if _is_prompt(model.tags)}

    def live(self) -> dict[str, LiveModel]:
        """Map each registered prompt to its aliases and its canary.

        Cheap enough for polling: a few SQL statements, or one request per ``PAGE`` models.
        """
        with self._store.translating("reading the aliases"):
            found = [model for model in self._rows() if _is_prompt(model.tags)]
            return {
                it.name: LiveModel(it.aliases, read_canary(it.tags.get(CANARY_TAG))) for it in found
            }

    def _rows(self) -> list[ModelRow]:
        rows = read_models(self._store.registry_uri)
        return self._asked() if rows is None else rows

    def _asked(self) -> list[ModelRow]:
        return list(map(_row, self._models()))

    def _models(self) -> Iterator[RegisteredModel]:
        return self._pages("search_registered_models")

    def _pages(self, method: str, **arguments: Any) -> Iterator[Any]:
        token: str | None = None
        while True:
            page = getattr(self._store.client, method)(
                max_results=PAGE, page_token=token, **arguments
            )
            yield from page
            token = page.token
            if not token:
                return

    def _model(self, name: str) -> RegisteredModel:
        from mlflow.exceptions import MlflowException

        with self._store.translating(f"reading registered model {printable(name)}"):
            try:
                return self._store.client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            known = [model.name for model in self._models()]
        empty = "none is registered yet; orchestrator run JOB registers one"
        raise BadInput(
            f"no registered model {printable(name)!r} in {self.display_uri}",
            suggestion(name, known) or empty,
        )

    def _version(self, model: RegisteredModel, version: int) -> VersionSummary:
        from mlflow.exceptions import MlflowException

        with self._store.translating(f"reading version {version} of {printable(model.name)}"):
            try:
                entity = self._store.client.get_model_version(model.name, str(version))
                return version_summary(entity, _aliases(model))
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        raise self._no_such_version(model.name, version)

    def _no_such_version(self, name: str, version: int) -> NoSuchVersion:
        """Tell a deleted version from a number that was never used: MLflow counts versions up."""
        known = [summary.version for summary in self.versions(name)]
        if known and version < max(known):
            message = f"version {version} of registered model {printable(name)} was deleted"
        else:
            message = f"registered model {printable(name)} has no version {version}"
        return NoSuchVersion(message, self._listed_versions(known))

    def _known_versions(self, name: str) -> str:
        return self._listed_versions([summary.version for summary in self.versions(name)])

    def _listed_versions(self, known: Sequence[int]) -> str:
        shown = ", ".join(str(number) for number in known[:10]) + (
            ", ..." if len(known) > 10 else ""
        )
        return f"known versions: {shown}" if known else "it has no versions"

    def _fetch(self, summary: VersionSummary, cache_dir: Path | None = None) -> Path:
        return fetch(self._store, summary, cache_dir or self.cache_dir)

    def test_outcomes(self, version: VersionSummary, data: DataRecord) -> RowOutcomes | None:
        """Read the outcomes of the test rows of a version's own data; None if they are not kept."""
        return read_outcomes(self._store, version, data.test_fingerprint or data.fingerprint)

    def log_evaluations(self, version: VersionSummary, records: Sequence[EvaluationRecord]) -> str:
        """Store a version's evaluation results on other data; return the ID of their run."""
        with self._store.translating(
            f"logging the evaluation of {printable(version.name)}:{version.version}"
        ):
            return log_evaluations(self._store, version, records)

    # Aliases. Every move is on record, one after another: see aliases/ledger.py.

    def history(self, name: str) -> list[Move]:
        """List every recorded move of the model's aliases, oldest first for each alias."""
        model = self._model(name)
        with self._store.translating(f"reading the history of {printable(name)}"):
            return recorded(self._store, model)

    def set_alias(
        self,
        name: str,
        alias: str,
        version: int,
        reason: str = "",
        kind: Kind = "set",
        check: Check | None = None,
    ) -> int | None:
        """Point the alias at the version without comparing versions, and record the move.

        Returns the version that held the alias before. ``check`` replaces ``reason``: it receives
        the current holder and returns the reason, or raises to prevent the move.
        """
        check_alias(alias)
        self._version(self._model(name), version)
        old, _ = self._move(name, alias, version, kind, check or (lambda holder: reason))
        return old

    def _move(
        self, name: str, alias: str, version: int, kind: Kind, check: Check
    ) -> tuple[int | None, str]:
        with self._store.translating(f"moving {alias} of {printable(name)}"):
            moved = move_alias(self._store, name, alias, version, kind, check)
            if alias == CHAMPION:
                # The note only saves time: without it, a listing reads the version itself.
                with suppress(Exception):
                    found = self._store.client.get_model_version(name, str(version))
                    note = {"version": version, "metrics": version_summary(found, {}).metrics}
                    self._store.client.set_registered_model_tag(
                        name, CHAMPION_TAG, json.dumps(note)
                    )
            return moved

    def promote(
        self, name: str, version: int, alias: str = CHAMPION, force_reason: str | None = None
    ) -> tuple[int | None, int]:
        """Move the alias as ``promotion`` does; return the old and the new version."""
        moved = self.promotion(name, version, alias, force_reason)
        return moved.before, moved.after

    def promotion(
        self, name: str, version: int, alias: str = CHAMPION, force_reason: str | None = None
    ) -> Promotion:
        """Move the alias to the version if it passes the gate.

        The artifact must be complete and fit its base model's context, and must work with the
        server and the clients of the alias's current holder. A new champion must beat the old one
        on the same test rows. ``force_reason`` admits a version that differs or is no better, and
        is recorded with the move. Raises Overtaken when another program moves the alias at the same
        time.
        """
        check_alias(alias)
        new = self._candidate(name, version)
        seen = self.aliases(name).get(alias)
        verdicts = [Verdict(True, "")]

        def check(holder: int | None) -> str:
            if holder != seen:
                raise Overtaken(
                    f"{alias} of {printable(name)} was moved to version {holder} by somebody else "
                    "meanwhile",
                    f"look at it, then promote again: orchestrator models {printable(name)}",
                )
            verdicts.append(self._admitted(name, version, new, alias, holder, force_reason))
            return verdicts[-1].reason

        kind: Kind = "promoted" if force_reason is None else "forced"
        before = self.set_alias(name, alias, version, kind=kind, check=check)
        return Promotion(before, version, verdicts[-1].reason, verdicts[-1].confidence)

    def rollback(self, name: str, alias: str = CHAMPION, reason: str = "") -> tuple[int, int]:
        """Move the alias back to the version that held it before.

        Returns the version that the alias left and the version that it has now.
        """
        current = self.aliases(name).get(alias)
        before = former_holder(self.history(name), alias, current)
        if current is None or before is None:
            raise BadInput(
                f"alias {printable(alias)} of {printable(name)} has no former version on record",
                f"orchestrator promote {printable(name)} VERSION; {self._known_versions(name)}",
            )
        self._candidate(name, before)

        def check(holder: int | None) -> str:
            if holder != current:
                raise Overtaken(
                    f"{alias} of {printable(name)} was moved to version {holder} by somebody else "
                    "meanwhile",
                    f"look at it first: orchestrator models {printable(name)}",
                )
            return reason

        self.set_alias(name, alias, before, kind="rollback", check=check)
        return current, before

    def set_canary(self, name: str, alias: str, percent: float) -> Canary:
        """Send a share of the name's traffic to another alias, which must exist."""
        canary = make_canary(alias, percent)
        aliases = self.aliases(name)
        if alias == CHAMPION or alias not in aliases:
            others = [it for it in aliases if it != CHAMPION]
            raise BadInput(
                f"registered model {printable(name)} has no alias {printable(alias)!r} beside its "
                "champion",
                suggestion(alias, others)
                or f"orchestrator promote {printable(name)} VERSION --alias challenger",
            )
        with self._store.translating(f"setting the canary of {printable(name)}"):
            self._store.client.set_registered_model_tag(name, CANARY_TAG, str(canary))
        return canary

    def end_canary(self, name: str) -> Canary | None:
        """Send all of the name's traffic to its champion again; return the former canary."""
        model = self._model(name)
        if CANARY_TAG in model.tags:
            with self._store.translating(f"ending the canary of {printable(name)}"):
                self._store.client.delete_registered_model_tag(name, CANARY_TAG)
        return read_canary(model.tags.get(CANARY_TAG))

    def auto_alias(
        self,
        name: str,
        version: int,
        alias: str = "challenger",
        metric: str = "accuracy",
        better: Better = "max",
        promote_if: PromoteIf = "better",
    ) -> AliasOutcome:
        """Give a search's new version the job spec's alias, and make it champion if it earns that.

        It earns that by beating the current champion, or by having test results where there is no
        champion. ``promote_if`` is the job spec's.
        """
        if alias != CHAMPION:
            self.set_alias(name, alias, version, kind="search")
        new = self._candidate(name, version)
        verdicts: list[Verdict] = []

        def contest(holder: int | None) -> str:
            found = self._contest(name, version, new, holder, metric, better, promote_if)
            verdicts.append(found)
            if not found.won:
                stays = "" if holder is None else f", version {holder} stays"
                hint = _next_step(name, version, holder, found, promote_if)
                raise _NotBetter(f"Version {version} is not champion{stays}: {found.reason}.{hint}")
            return found.reason

        try:
            _, reason = self._move(name, CHAMPION, version, "search", contest)
        except _NotBetter as lost:
            kept = None if alias == CHAMPION else alias
            return AliasOutcome(kept, lost.message, verdicts[-1].confidence)
        text = f"Version {version} is champion: {reason}."
        return AliasOutcome(CHAMPION, text, verdicts[-1].confidence if verdicts else None)

    def _candidate(self, name: str, version: int) -> ComparedVersion:
        """Fetch the version and check its whole artifact: digests, shapes and finite values."""
        summary = self._version(self._model(name), version)
        with self._store.translating(f"fetching version {version} of {printable(name)}"):
            manifest = read_manifest(self._fetch(summary))
        reader = partial(read_outcomes, self._store, summary)
        return ComparedVersion(manifest, summary.tags, reader)

    def _contest(
        self,
        name: str,
        version: int,
        new: ComparedVersion,
        champion: int | None,
        metric: str,
        better: Better,
        promote_if: PromoteIf,
    ) -> Verdict:
        if found := promotion.unsound(new.manifest):
            return Verdict(False, found[0])
        if champion is None:
            if new.results():
                return Verdict(True, "there was none before")
            return Verdict(False, "nothing is known of how good it is")
        if champion == version:
            return Verdict(True, "it was already")
        try:
            holder = self._candidate(name, champion)
        except BadInput as error:
            return Verdict(False, f"the champion can't be read to compare ({error.message})")
        return promotion.verdict(new, holder, metric, better, promote_if)

    def _admitted(
        self,
        name: str,
        version: int,
        new: ComparedVersion,
        alias: str,
        holder: int | None,
        force_reason: str | None,
    ) -> Verdict:
        """Return the reason of a promotion; raise BadInput that lists every objection to it."""
        if found := promotion.unsound(new.manifest):
            raise BadInput(
                f"version {version} of {printable(name)} can't be served: {'; '.join(found)}"
            )
        if force_reason is not None:
            return Verdict(True, force_reason)
        if holder is None or holder == version:
            return Verdict(True, "")
        verdict = self._against(name, new, alias, holder)
        if not verdict.won:
            raise BadInput(
                f"version {version} of {printable(name)} can't replace version {holder} "
                f"as {alias}: {verdict.reason}",
                "choose another version, or write why it has to be: --force REASON",
            )
        return verdict

    def _against(self, name: str, new: ComparedVersion, alias: str, holder: int) -> Verdict:
        """Compare a version with the holder; a version that loses has objections as its reason."""
        try:
            old = self._candidate(name, holder)
        except BadInput as error:
            return Verdict(False, f"its holder can't be read to compare ({error.message})")
        if found := promotion.differences(new.manifest, old.manifest):
            return Verdict(False, "; ".join(found))
        if alias != CHAMPION:
            return Verdict(True, "")
        return promotion.verdict(new, old, *promotion.comparison_metric(new, old))

    # Other.

    def ui_command(self, port: int = 5000) -> UiCommand:
        """Build the command that starts MLflow's web UI on this store, for this machine only.

        Raises BadInput when the store is an MLflow server, which has a UI of its own.
        """
        store = self._store
        if store.tracking_uri.startswith(SERVERS):
            raise BadInput(
                "the store is an MLflow server, which has its own pages", f"open {self.display_uri}"
            )
        argv = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        if store.artifact_root:
            # Runs created through this server then store their files beside those of other runs.
            argv += ["--artifacts-destination", artifact_location(store.artifact_root)]
        env = {
            "MLFLOW_BACKEND_STORE_URI": store.tracking_uri,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Job execution would start eight processes of 240 MB each, which browsing never needs.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        if store.registry_uri != store.tracking_uri:
            env["MLFLOW_REGISTRY_STORE_URI"] = store.registry_uri
        return UiCommand(argv, env)


class _NotBetter(BadInput):
    """A search's new prompt does not beat the champion."""


def _next_step(
    name: str, version: int, champion: int | None, found: Verdict, promote_if: PromoteIf
) -> str:
    """Say how to learn the confidence that a job asks for, where it is unknown."""
    if promote_if == "better" or champion is None or found.confidence or not found.compared:
        return ""
    shown = printable(name)
    return (
        f" registry.promote_if is {promote_if}. To test the difference: "
        f"`orchestrator evaluate {shown}:{champion} {shown}:{version} --data PATH` with the test "
        f"rows, then `orchestrator promote {shown} {version}`."
    )


def check_name(name: str) -> None:
    """Raise BadInput for a name that no registered model may have."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise BadInput(
            f"{printable(name)!r} can't name a registered model", f"allowed: {NAME_PATTERN}"
        )


def check_alias(alias: str) -> None:
    """Raise BadInput for an alias that MLflow refuses or reserves."""
    if not re.fullmatch(ALIAS_PATTERN, alias) or RESERVED_ALIAS.match(alias):
        raise BadInput(
            f"{printable(alias)!r} can't be an alias",
            "letters, digits, - and _; not latest, v1, v2, ...",
        )


def _aliases(model: RegisteredModel) -> dict[str, int]:
    return {alias: int(version) for alias, version in (model.aliases or {}).items()}


def _row(model: RegisteredModel) -> ModelRow:
    newest = max((int(it.version) for it in model.latest_versions or []), default=None)
    return ModelRow(model.name, newest, _aliases(model), dict(model.tags or {}))


def _is_prompt(tags: Mapping[str, str]) -> bool:
    return tags.get(KIND_TAG) == KIND


def _noted(model: ModelRow, champion: int) -> Metrics | None:
    """Return the metrics noted when this version became champion.

    Returns None when there is no readable note, or when it is about another version.
    """
    try:
        note = json.loads(model.tags.get(CHAMPION_TAG, ""))
        return dict(note["metrics"]) if note["version"] == champion else None
    except (ValueError, KeyError, TypeError):
        return None
