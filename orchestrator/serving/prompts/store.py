"""The prompt store: names and aliases mapped to loaded versions, kept up to date with the registry.

A background thread polls the registry. When an alias moves, the new version is loaded first and
only then replaces the old one. A version that can't be served is refused, and the old version
stays. While the registry is unreachable, the store keeps serving what it knows.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from orchestrator.errors import BadInput, OrchestratorError, Unreachable
from orchestrator.job.labels import Label
from orchestrator.models.backbone import Backbone
from orchestrator.registry import CHAMPION
from orchestrator.registry.aliases.canary import Canary, LiveModel
from orchestrator.registry.versions.refs import (
    ModelRef,
    NoSuchVersion,
    parse_ref,
    printable,
    suggestion,
)
from orchestrator.serving.prompts.cache import Key, PromptCache
from orchestrator.serving.prompts.served_prompt import ServedPrompt, created_timestamp, load_prompt
from orchestrator.utils.text import first_line

log = logging.getLogger(__name__)

POLL_SECONDS = 2.0
MAX_BYTES = 2 << 30
MAX_HOST_BYTES = 8 << 30
RETRY_SECONDS = 30.0  # a refused version is tried again then, because it may have been repaired
MAX_REFUSED = 1024  # clients may name any version, so the memory of refusals is bounded
# How many names an unknown name is compared with: comparing is slow, and clients can trigger it.
MAX_COMPARED = 500
MAX_VERSION = 2**31 - 1  # the largest version number that a registry's database holds


class RegistrySource(Protocol):
    """The part of a registry that the store uses.

    Its methods raise BadInput for what does not exist and Unreachable during an outage.
    """

    def live(self) -> Mapping[str, LiveModel]:
        """Return the aliases and the canary of each registered prompt, by name."""

    def fetch(self, name: str, version: int) -> Path:
        """Return a local folder that holds the version's artifact."""


class ModelNotFound(BadInput):
    """No prompt of that name is served here, or its version was refused.

    The message lists the prompts that are served, or says what is missing.
    """


@dataclass(frozen=True)
class ModelCard:
    """One entry of the list of served models."""

    id: str
    name: str
    version: int
    alias: str
    base_model: str
    created: int
    labels: tuple[Label, ...]


@dataclass(frozen=True)
class _Refusal:
    error: BadInput
    at: float


class PromptStore:
    """The loaded prompts of one backbone.

    Keys and values take at most ``max_bytes`` in the model's memory and ``max_host_bytes`` in the
    host's memory, if the two differ. The least recently used prompts are evicted first.
    """

    def __init__(
        self,
        backbone: Backbone,
        source: RegistrySource,
        served: Sequence[str] = (),
        max_bytes: int = MAX_BYTES,
        poll_seconds: float = POLL_SECONDS,
        max_host_bytes: int = 0,
    ) -> None:
        """Create an empty store; ``start`` fills it.

        ``served`` lists the references that clients may use, and an empty list allows all. A bare
        name allows all versions and aliases of the model; other references allow only themselves.
        """
        self._backbone = backbone
        self._source = source
        self._served = tuple(parse_ref(text) for text in served)
        self._poll_seconds = poll_seconds
        self._known: dict[str, dict[str, int]] | None = None
        """Name to alias to version, as last read from the registry; None until it has answered."""
        self._canaries: dict[str, Canary] = {}
        self._routes: dict[tuple[str, str], int] = {}
        """(name, alias) to the version that answers for it; each was loaded successfully once."""
        self._cards: dict[Key, ModelCard] = {}
        self._cache = PromptCache(max_bytes, max_host_bytes)
        self._refused: OrderedDict[Key, _Refusal] = OrderedDict()
        self.counts: Counter[tuple[str, str]] = Counter()
        """(event, registered model) to the number of such events.

        Events are "hits", "loads", "returns", "evictions" and "refusals". Only models in the
        registry are counted.
        """
        self._lock = threading.RLock()  # guards the fields above; held briefly
        self._loading = threading.Lock()  # one load at a time, so that no version is loaded twice
        self._outage = ""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    # Looking up prompts.

    def route(self, model: str) -> str:
        """Return the reference that a request for ``model`` is sent to.

        Normally that is ``model`` itself. If ``model`` is a bare name with a canary, the canary's
        share of the requests goes to the canary's alias, by chance.
        """
        canary = self._canaries.get(model)
        if (
            canary is None
            or (model, canary.alias) not in self._routes
            or random.random() * 100 >= canary.percent
        ):
            return model
        return f"{model}@{canary.alias}"

    def loaded(self, model: str) -> ServedPrompt | None:
        """Return the prompt that answers for ``model``, or None if it would have to be loaded.

        Raises ModelNotFound for an unknown model, and Unreachable until the registry has answered.
        """
        with self._lock:
            for key in self._candidates(model):
                if prompt := self._cache.get(key):
                    self.counts["hits", key[0]] += 1
                    return prompt
                if not self._is_refused(key):
                    return None
        return None

    def get(self, model: str) -> ServedPrompt:
        """Return the prompt that answers for ``model``, loading it when needed.

        Raises ModelNotFound when there is no such prompt or it can't be served, and Unreachable
        when the registry is needed and does not answer.
        """
        with self._lock:
            candidates = self._candidates(model)
        for attempt, key in enumerate(candidates):
            try:
                return self._load(key)
            except OrchestratorError as error:
                if attempt + 1 == len(candidates):
                    if isinstance(error, Unreachable):
                        raise
                    absent = isinstance(error, NoSuchVersion)
                    raise (_absent if absent else _not_served)(model, key) from None
        raise AssertionError("a known model has a candidate")

    def cards(self) -> list[ModelCard]:
        """Return a card for every alias that answers; champions are listed by their bare name."""
        with self._lock:
            return [
                self._card(name, alias, version)
                for (name, alias), version in sorted(self._routes.items())
            ]

    def card_of(self, model_id: str, prompt: ServedPrompt) -> ModelCard:
        """Return a loaded prompt's card with the id ``model_id``, which need not be listed."""
        with self._lock:
            card = self._cards.get((prompt.name, prompt.version)) or _card_of(prompt)
            aliases = (
                alias
                for (name, alias), version in self._routes.items()
                if (name, version) == key_of(prompt)
            )
            return replace(card, id=model_id, alias=next(iter(sorted(aliases)), ""))

    @property
    def loaded_bytes(self) -> int:
        """The bytes of keys and values in the model's memory."""
        return self._cache.nbytes

    @property
    def loaded_count(self) -> int:
        """The number of prompts in the model's memory."""
        return len(self._cache)

    @property
    def host_bytes(self) -> int:
        """The bytes of keys and values in the host's memory; 0 if the model is in it too."""
        return self._cache.host_nbytes

    def versions(self) -> dict[tuple[str, str], int]:
        """Return the version that answers, by (name, alias)."""
        with self._lock:
            return dict(self._routes)

    def refused(self) -> list[Key]:
        """Return the versions that an alias points to and that can't be served.

        Where the alias had an older version, that one still answers.
        """
        with self._lock:
            target_keys = {(name, version) for (name, _), version in self._targets()}
            return sorted(key for key in target_keys if key in self._refused)

    # Following the registry.

    def start(self) -> None:
        """Load the registry's prompts, then start polling in the background."""
        self.refresh()
        self._thread = threading.Thread(target=self._poll, name="prompt-store", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop polling; loaded prompts stay usable."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def refresh(self) -> None:
        """Read the registry once and follow the aliases that moved.

        If the registry does not answer, nothing changes.
        """
        try:
            live = self._source.live()
        except Exception as error:
            # Whatever the registry's client raises, this process keeps serving.
            self._report_outage(error)
            return
        if self._outage:
            log.warning("the registry can be reached again")
            self._outage = ""
        with self._lock:
            self._known = {name: dict(model.aliases) for name, model in live.items()}
            targets = dict(self._targets())
            self._routes = {
                route: version for route, version in self._routes.items() if route in targets
            }
            routed_keys = {(name, version) for (name, _), version in self._routes.items()}
            self._cards = {
                key: card
                for key, card in self._cards.items()
                if key in routed_keys or key in self._cache
            }
        # Champions are loaded last: as the most recently used, they stay when memory is short.
        for route in sorted(targets, key=lambda route: route[1] == CHAMPION):
            self._follow(route, targets[route])
        self._follow_canaries({name: model.canary for name, model in live.items() if model.canary})

    def _follow_canaries(self, canaries: dict[str, Canary]) -> None:
        for name in canaries.keys() | self._canaries.keys():
            before, now = self._canaries.get(name), canaries.get(name)
            if before != now:
                log.info("canary of %s: now %s, was %s", printable(name), now, before)
        self._canaries = canaries

    def _poll(self) -> None:
        while not self._stop.wait(self._poll_seconds):
            try:
                self.refresh()
            except Exception:
                log.exception("following the registry failed")

    def _targets(self) -> Iterator[tuple[tuple[str, str], int]]:
        """Yield each (name, alias) that may be served and the version that it points to."""
        for name, aliases in (self._known or {}).items():
            for alias, version in aliases.items():
                if self._allows_alias(name, alias):
                    yield (name, alias), version

    def _follow(self, route: tuple[str, str], version: int) -> None:
        """Load the version, then let the alias answer with it.

        If the version can't be loaded, nothing changes.
        """
        if self._routes.get(route) == version:
            return
        try:
            self._load((route[0], version))
        except OrchestratorError:
            return  # already logged; the old version keeps answering
        with self._lock:
            before = self._routes.get(route)
            self._routes[route] = version
        log.info("%s@%s: now version %s, was %s", printable(route[0]), route[1], version, before)

    def _report_outage(self, error: Exception) -> None:
        text = first_line(error, with_type=True)
        if text != self._outage:
            log.warning(
                "the registry does not answer; serving the prompts already loaded: %s", text
            )
        self._outage = text

    # Resolving references.

    def _candidates(self, model: str) -> list[Key]:
        """Return the versions that may answer for ``model``, the preferred one first.

        Raises ModelNotFound for an unknown model, and Unreachable until the registry has answered.
        """
        if self._known is None:
            raise Unreachable("the registry has not answered yet", "try again in a few seconds")
        ref = self._parse(model)
        if ref is None or ref.name not in self._known or not self._allows(ref):
            raise self._unknown(model)
        if ref.version is not None:
            return [(ref.name, ref.version)]
        return self._alias_candidates(model, ref.name, ref.alias or CHAMPION)

    def _alias_candidates(self, model: str, name: str, alias: str) -> list[Key]:
        assert self._known is not None
        target, current = self._known[name].get(alias), self._routes.get((name, alias))
        if target is None:
            alias_names = ", ".join(sorted(self._known[name])) or "none"
            raise ModelNotFound(
                f"The model {printable(model)!r} does not exist: "
                f"{printable(name)!r} has no alias {printable(alias)!r} "
                f"(its aliases: {alias_names}); to request a version, write name:version"
            )
        if current is None or current == target:
            return [(name, target)]
        # The alias moved: the old version answers until the new one is loaded. If the old one is
        # not in memory either, try the new one first.
        current_key, target_key = (name, current), (name, target)
        if current_key in self._cache:
            return [current_key, target_key]
        return [target_key, current_key]

    def _parse(self, model: str) -> ModelRef | None:
        if self._known and model in self._known:
            return ModelRef(model)  # registered names may contain @ or :
        try:
            ref = parse_ref(model)
        except BadInput:
            return None
        return None if ref.version is not None and ref.version > MAX_VERSION else ref

    def _allows(self, ref: ModelRef) -> bool:
        if ref.version is not None:
            if not self._served:
                return True
            entries = (entry for entry in self._served if entry.name == ref.name)
            return any(
                entry.alias is None and entry.version in (None, ref.version) for entry in entries
            )
        return self._allows_alias(ref.name, ref.alias or CHAMPION)

    def _allows_alias(self, name: str, alias: str) -> bool:
        if not self._served:
            return True
        entries = (entry for entry in self._served if entry.name == name)
        return any(entry.version is None and entry.alias in (None, alias) for entry in entries)

    def _unknown(self, model: str) -> ModelNotFound:
        served = [_wire_id(name, alias) for name, alias in islice(self._routes, MAX_COMPARED)]
        listed = suggestion(model, served) or "no model is served yet"
        return ModelNotFound(f"The model {printable(model)!r} does not exist; {listed}")

    def _card(self, name: str, alias: str, version: int) -> ModelCard:
        return replace(self._cards[name, version], id=_wire_id(name, alias), alias=alias)

    # Loading prompts.

    def _load(self, key: Key) -> ServedPrompt:
        """Return a prompt from memory, or load it from the registry.

        Raises BadInput when the version is refused, and Unreachable when it can't be fetched.
        """
        if prompt := self._hit(key):
            return prompt
        with self._loading:
            if prompt := self._hit(key):  # another thread loaded it while this one waited
                return prompt
            prompt = self._fetch(key)
            self._keep(key, prompt)
            return prompt

    def _hit(self, key: Key) -> ServedPrompt | None:
        """Return a prompt from either level of the cache; raise BadInput if it is refused."""
        with self._lock:
            if prompt := self._cache.get(key):
                return prompt
            if returned := self._cache.bring(key):
                prompt, evicted = returned
                self.counts["returns", key[0]] += 1
                self._note_gone(evicted)
                return prompt
            if self._is_refused(key):
                raise self._refused[key].error
            return None

    def _fetch(self, key: Key) -> ServedPrompt:
        try:
            prompt = load_prompt(self._backbone, self._source.fetch(*key), *key)
            self.counts["loads", key[0]] += 1
            return prompt
        except Unreachable as error:
            log.warning(
                "version %s of %s can't be fetched: %s", key[1], printable(key[0]), error.message
            )
            raise
        except NoSuchVersion as error:
            self._refuse(key, error)
            raise
        except Exception as error:
            # An artifact comes from outside: no error in it may stop the server.
            reason = (
                error.message
                if isinstance(error, OrchestratorError)
                else first_line(error, with_type=True)
            )
            self._refuse(key, BadInput(reason))
            raise BadInput(reason) from error

    def _keep(self, key: Key, prompt: ServedPrompt) -> None:
        card = _card_of(prompt)
        with self._lock:
            self._refused.pop(key, None)
            self._cards[key] = card
            self._note_gone(self._cache.put(key, prompt))

    def _note_gone(self, keys: Sequence[Key]) -> None:
        for name, version in keys:
            self.counts["evictions", name] += 1
            log.info(
                "version %s of %s is evicted from the model's memory", version, printable(name)
            )

    def _is_refused(self, key: Key) -> bool:
        refusal = self._refused.get(key)
        return refusal is not None and time.monotonic() - refusal.at < RETRY_SECONDS

    def _refuse(self, key: Key, error: BadInput) -> None:
        with self._lock:
            if key[0] in (self._known or {}):
                self.counts["refusals", key[0]] += 1
            previous = self._refused.pop(key, None)
            self._refused[key] = _Refusal(error, time.monotonic())
            while len(self._refused) > MAX_REFUSED:
                self._refused.popitem(last=False)
        if previous is None or previous.error.message != error.message:
            log.warning("version %s of %s is refused: %s", key[1], printable(key[0]), error.message)


def _absent(model: str, key: Key) -> ModelNotFound:
    return ModelNotFound(
        f"The model {printable(model)!r} does not exist: "
        f"{printable(key[0])!r} has no version {key[1]}"
    )


def _not_served(model: str, key: Key) -> ModelNotFound:
    # The reason may contain paths of this machine, so only the log has it; the client gets the
    # version.
    return ModelNotFound(
        f"The model {printable(model)!r} does not exist or can't be served: version {key[1]} of "
        f"{printable(key[0])!r} was refused; the server's log says why"
    )


def key_of(prompt: ServedPrompt) -> Key:
    return prompt.name, prompt.version


def _card_of(prompt: ServedPrompt) -> ModelCard:
    manifest = prompt.manifest
    return ModelCard(
        "", *key_of(prompt), "", manifest.base_model.id, created_timestamp(manifest), prompt.labels
    )


def _wire_id(name: str, alias: str) -> str:
    return name if alias == CHAMPION else f"{name}@{alias}"
