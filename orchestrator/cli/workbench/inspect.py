"""Inspecting a prompt: the words near its virtual tokens, and its drift from its start.

Lester et al. 2021, section 7, interpret prompts by their nearest neighbours in cosine distance. A
prefix has no embeddings. Instead, the norms of its keys and values are compared, layer by layer,
with those of real tokens. Shapes: P virtual tokens, H width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from orchestrator.artifact import IMPORTED, Manifest, PromptArtifact
from orchestrator.errors import BadInput, OrchestratorError
from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import BaseModelSpec
from orchestrator.models.backbone import Backbone, PromptTensors, default_device, load_backbone
from orchestrator.models.nearest_words import CHUNK, nearest_rows
from orchestrator.models.source import looks_like_path, resolve_model
from orchestrator.registry import Registry, parse_ref
from orchestrator.search.prepare import stored_tensors
from orchestrator.serving.prompts.served_prompt import load_prompt, prompt_tensors
from orchestrator.tuning.prompts import InitContext, Method, make_prompt
from orchestrator.tuning.prompts.inits import frequent_ids
from orchestrator.utils.documents import JsonObject

NEAREST = 5
REAL_TOKENS = 64  # enough for mean norms of keys and values

Artifacts = Callable[[str], Mapping[str, Tensor]]
"""Returns the tensors of an init artifact by its reference in the job spec.

Raises OrchestratorError when they are not available.
"""


@dataclass(frozen=True)
class Neighbour:
    """A vocabulary token near a virtual token; ``distance`` is 1 - cosine, from 0 to 2."""

    id: int
    token: str
    distance: float


@dataclass(frozen=True)
class Drift:
    """The change from the start of tuning to its end.

    ``cosine`` is the cosine of the two vectors, None if one of them is zero and has no direction.
    ``norm`` is the norm of their difference, and ``start_norm`` the norm of the start.
    """

    cosine: float | None
    norm: float
    start_norm: float


@dataclass(frozen=True)
class VirtualToken:
    """A virtual token at ``place``: its norm, its nearest vocabulary tokens, and its drift."""

    place: int
    norm: float
    nearest: tuple[Neighbour, ...]
    drift: Drift | None


@dataclass(frozen=True)
class Layer:
    """One layer of a prefix at one attention site.

    It has the mean norms of the prefix's keys and values, and those of real tokens.
    """

    site: str
    layer: int
    key_norm: float
    value_norm: float
    real_key_norm: float
    real_value_norm: float
    drift: Drift | None


@dataclass(frozen=True)
class Inspection:
    """The findings about a prompt.

    A soft prompt has ``tokens``, a prefix has ``layers``. ``vocabulary_norm`` is the mean norm of
    the vocabulary's embeddings. ``no_drift`` is the reason that there is no drift, where there is
    none.
    """

    tokens: tuple[VirtualToken, ...]
    layers: tuple[Layer, ...]
    vocabulary_norm: float
    no_drift: str


def inspect_model(
    registry: Registry, model: str, nearest: int, base_model: str | None = None
) -> JsonObject:
    """Inspect a registered prompt; return the document of ``inspect --json``.

    ``base_model`` is the base model's location, if it was moved.
    """
    version = registry.resolve(model)
    folder = registry.fetch(version.name, version.version)
    artifact = PromptArtifact.load(folder)
    record = artifact.manifest.base_model
    source = resolve_model(BaseModelSpec(id=base_model or record.id, revision=record.revision))
    backbone = load_backbone(source, default_device())
    answers = load_prompt(backbone, folder, version.name, version.version).encoder.answer_words
    context = InitContext.of(backbone, answers)
    found = inspect_prompt(
        backbone, artifact, context, lambda reference: registered(registry, reference), nearest
    )
    return {
        "name": version.name,
        "version": version.version,
        "method": artifact.manifest.method,
        "num_virtual_tokens": artifact.manifest.num_virtual_tokens,
        "base_model": record.id,
        "config": artifact.manifest.config,
        **asdict(found),
    }


def registered(registry: Registry, reference: str) -> dict[str, Tensor]:
    """Load the tensors that ``init: {artifact: REFERENCE}`` stood for.

    Raises BadInput when the reference may mean another version by now, or when there is no such
    artifact.
    """
    folder = Path(reference).expanduser()
    if folder.is_dir() or looks_like_path(reference):
        return stored_tensors(folder)
    ref = parse_ref(reference)
    if ref.version is None:
        raise BadInput(f"{reference!r} may mean another version by now")
    return stored_tensors(registry.fetch(ref.name, ref.version))


@torch.inference_mode()
def inspect_prompt(
    backbone: Backbone,
    artifact: PromptArtifact,
    context: InitContext,
    artifacts: Artifacts,
    nearest: int = NEAREST,
) -> Inspection:
    """Inspect a prompt on its base model.

    ``context`` is the context in which the prompt was initialised, except for its ``artifacts``.
    """
    prompt = prompt_tensors(artifact)
    start, no_drift = None, ""
    try:
        start = initial(artifact.manifest, context, artifacts)
        _check_same_shape(prompt, start)
    except OrchestratorError as error:
        start, no_drift = None, error.message
    tokens = (
        () if prompt.embeddings is None else _tokens(backbone, prompt.embeddings, start, nearest)
    )
    layers = _layers(backbone, prompt.prefixes, start, context) if prompt.prefixes else ()
    return Inspection(tokens, layers, _vocabulary_norm(backbone), no_drift)


def initial(manifest: Manifest, context: InitContext, artifacts: Artifacts) -> PromptTensors:
    """Rebuild the prompt before its first step, from its configuration and seed.

    Raises BadInput with the reason when it can't be rebuilt.
    """
    if IMPORTED in manifest.config:
        raise BadInput("it was imported from PEFT, which does not keep a prompt's start")
    spec = TrialSpec.from_config(manifest.config)
    if spec.init_artifact is not None:
        try:
            tensors = artifacts(spec.init_artifact)
        except OrchestratorError as error:
            raise BadInput(
                f"the prompt that it started from is not to be had: {error.message}"
            ) from None
        context = _with(context, spec.init_artifact, tensors)
    network = manifest.reparameterization
    # The manifest's method was checked when it was loaded.
    method = Method(manifest.method, network.type, network.hidden_size)  # type: ignore[arg-type]
    return make_prompt(method, spec, context)()  # type: ignore[no-any-return]


def nearest_tokens(
    backbone: Backbone, embeddings: Tensor, count: int
) -> list[tuple[Neighbour, ...]]:
    """Find the ``count`` nearest vocabulary tokens of each of [P, H], nearest first."""
    near = nearest_rows(
        embeddings.to(backbone.device),
        lambda start, end: backbone.embed(torch.arange(start, end, device=backbone.device)),
        _vocabulary_size(backbone),
        count,
    )
    return [
        tuple(
            Neighbour(index, backbone.tokenizer.decode([index]), distance)
            for index, distance in row
        )
        for row in near
    ]


def _vocabulary_size(backbone: Backbone) -> int:
    """Return the number of tokens that have an embedding; tables are padded to round sizes."""
    return min(len(backbone.tokenizer), len(backbone.table))


def _with(context: InitContext, reference: str, tensors: Mapping[str, Tensor]) -> InitContext:
    return replace(context, artifacts={**context.artifacts, reference: tensors})


def _check_same_shape(prompt: PromptTensors, start: PromptTensors) -> None:
    shapes = [
        {name: tuple(tensor.shape) for name, tensor in one.named().items()}
        for one in (prompt, start)
    ]
    if shapes[0] != shapes[1]:
        raise BadInput(
            f"its configuration describes a start of another shape: {shapes[1]}, not {shapes[0]}"
        )


def _tokens(
    backbone: Backbone, embeddings: Tensor, start: PromptTensors | None, nearest: int
) -> tuple[VirtualToken, ...]:
    starts = None if start is None else start.embeddings
    drifts = [None] * len(embeddings) if starts is None else [*map(_drift, embeddings, starts)]
    near = nearest_tokens(backbone, embeddings, nearest)
    return tuple(
        VirtualToken(place, float(vector.norm()), near[place], drifts[place])
        for place, vector in enumerate(embeddings)
    )


def _drift(now: Tensor, start: Tensor) -> Drift:
    """Measure the drift between two tensors of equal size."""
    now, start = now.float().flatten(), start.float().flatten()
    directed = bool(now.any() and start.any())
    return Drift(
        float(cosine_similarity(now, start, dim=0)) if directed else None,
        float((now - start).norm()),
        float(start.norm()),
    )


def _layers(
    backbone: Backbone,
    prefixes: Mapping[str, Tensor],
    start: PromptTensors | None,
    context: InitContext,
) -> tuple[Layer, ...]:
    ids = frequent_ids(context, min(REAL_TOKENS, backbone.info.context_length))
    real = backbone.activations(backbone.embed(torch.tensor(ids, device=backbone.device)))
    found = []
    for site, tensor in prefixes.items():
        norms, real_norms = _mean_norms(tensor), _mean_norms(real[site])
        for layer, keys_values in enumerate(tensor):
            drift = None if start is None else _drift(keys_values, start.prefixes[site][layer])
            found.append(Layer(site, layer, *norms[layer], *real_norms[layer], drift))
    return tuple(found)


def _mean_norms(tensor: Tensor) -> list[tuple[float, float]]:
    """Return each layer's mean norm of a head's keys and of its values.

    ``tensor`` is [L, 2, kv heads, P, head width].
    """
    return [(key, value) for key, value in tensor.float().norm(dim=-1).mean(dim=(2, 3)).tolist()]


def _vocabulary_norm(backbone: Backbone) -> float:
    size = _vocabulary_size(backbone)
    chunks = [torch.arange(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK)]
    total = sum(
        float(backbone.embed(ids.to(backbone.device)).float().norm(dim=1).sum()) for ids in chunks
    )
    return total / size
