"""A registered prompt as a Python object: classify, generate, evaluate, export."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from orchestrator.artifact import PromptArtifact
from orchestrator.cli.python.tables import is_table, keep_table, rows_of
from orchestrator.registry import Registry, VersionSummary, printable
from orchestrator.utils.documents import JsonObject

if TYPE_CHECKING:
    import datasets
    import pandas

    from orchestrator.cli.python.jobs import Source
    from orchestrator.serving.offline import OfflineModel

    Inputs: TypeAlias = (
        Sequence[str | Mapping[str, Any]] | pandas.Series | pandas.DataFrame | datasets.Dataset
    )


def load(model: str, *, base_model: str | None = None) -> RegisteredPrompt:
    """Fetch a registered prompt from the registry that MLFLOW_TRACKING_URI names.

    ``model`` is name, name@alias or name:version; a bare name means the champion. ``base_model`` is
    the base model's id or folder, if it lies elsewhere than when the prompt was tuned. The base
    model is loaded when it is first needed. Raises BadInput for a model that is not there, and
    Unreachable if the registry does not answer.
    """
    registry = Registry.connect()
    version = registry.resolve(model)
    artifact = PromptArtifact.load(registry.fetch(version.name, version.version))
    return RegisteredPrompt(registry, version, artifact, base_model)


class RegisteredPrompt:
    """One version of a registered prompt, with its base model in this process.

    It stays that version when the alias moves.
    """

    def __init__(
        self,
        registry: Registry,
        version: VersionSummary,
        artifact: PromptArtifact,
        base_model: str | None = None,
    ) -> None:
        self._registry = registry
        self._version = version
        self._artifact = artifact
        self._base_model = base_model

    @property
    def name(self) -> str:
        """The registered model's name."""
        return self._version.name

    @property
    def version(self) -> int:
        """The version's number."""
        return self._version.version

    @property
    def metrics(self) -> Mapping[str, Mapping[str, float]]:
        """The metrics of the search that found the prompt, by split."""
        return self._artifact.manifest.metrics

    @property
    def labels(self) -> tuple[Any, ...]:
        """The labels that ``classify`` chooses from; empty for a prompt that generates text."""
        return tuple(self._artifact.manifest.verbalizer_map() or ())

    def classify(self, inputs: Inputs) -> list[dict[str, Any]]:
        """Classify texts or rows.

        ``inputs`` is a list of texts, or of rows with the columns of the prompt's template; a
        series, a data frame or a data set works too. Returns a dictionary with ``label`` and
        ``probs`` for each, as the route /classify does. Raises BadInput for a prompt without
        labels, and for an input that it can't read.
        """
        return self._model.classify(rows_of(inputs))

    def generate(
        self,
        inputs: Inputs,
        *,
        max_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
    ) -> list[str]:
        """Complete texts or rows, one after another.

        ``inputs`` are as in ``classify``. Temperature 0 takes the likeliest token each time; higher
        ones draw from the likeliest tokens whose probabilities add up to ``top_p``. A text ends
        before one of the ``stop`` texts. Raises BadInput for a prompt of a masked model.
        """
        from orchestrator.serving.engine.generation import Sampling

        ends = (stop,) if isinstance(stop, str) else tuple(stop)
        sampling = Sampling(max_tokens, temperature, top_p, ends, seed)
        return [found.text for found in self._model.complete(rows_of(inputs), sampling)]

    def evaluate(
        self,
        data: Source,
        *,
        split: str = "test",
        by: str | None = None,
        target: str | None = None,
        references: str | None = None,
        rename: Mapping[str, str] | None = None,
        limit: int | None = None,
        metric: str | None = None,
        log: bool = True,
    ) -> Evaluation:
        """Evaluate the prompt on any data, as the verb ``evaluate`` does.

        ``data`` is a file, a data set of the hub, a data frame, a ``datasets.Dataset`` or an Arrow
        table. ``split`` chooses one of a data set that has several, ``by`` is a column whose values
        get figures of their own, ``target`` and ``references`` are columns if they are named
        otherwise there, and ``rename`` gives columns new names. ``limit`` takes the first rows
        only. ``log`` keeps the result with the version. Raises BadInput for rows that lack a
        column, or have a label that the prompt does not know.
        """
        from orchestrator.cli.workbench.domain_shift import Question, evaluate_models

        names = dict(rename or {})
        source = self._source(data, target, names)
        question = Question(source, split, by, target, references, names, limit)
        document = evaluate_models(
            self._registry, [f"{self.name}:{self.version}"], [question], log=log,
            say=_say, metric=metric, backbone=self._model.backbone,
        )  # fmt: skip
        return Evaluation(document)

    def _source(self, data: Source, target: str | None, rename: Mapping[str, str]) -> str:
        """Return the file or data set to evaluate on; a table is written to a file first."""
        if not is_table(data):
            return os.fspath(data)
        manifest, here = self._artifact.manifest, Path.cwd()
        file = keep_table(data, "data", target or manifest.target, rename, self.labels)
        # The name stands in tables and in the registry, so a short one is better.
        return str(file.relative_to(here) if file.is_relative_to(here) else file)

    def export(self, folder: str | os.PathLike[str], **options: Any) -> Path:
        """Write the prompt as a PEFT adapter folder, which must not exist; return the folder.

        ``options`` are those of the verb ``export``. Raises BadInput for a prompt that PEFT can't
        express.
        """
        from orchestrator.cli.workbench.exchange import export_model

        target = Path(folder)
        export_model(self._registry, f"{self.name}:{self.version}", target, **options)
        return target

    @cached_property
    def _model(self) -> OfflineModel:
        """The prompt on its base model, which is loaded here."""
        from orchestrator.cli.workbench.domain_shift import load_base_model
        from orchestrator.serving.offline import OfflineModel

        folder = self._registry.fetch(self.name, self.version)
        backbone = load_base_model([self._artifact], self._base_model)
        return OfflineModel.from_artifact(folder, backbone)

    def __str__(self) -> str:
        from orchestrator.cli.pages.registry import version_page

        return "\n".join(version_page(self._registry.version(f"{self.name}:{self.version}")))

    def __repr__(self) -> str:
        return f"<RegisteredPrompt {printable(self.name)}:{self.version}>"

    def _repr_html_(self) -> str:
        """Show the version's facts, in a notebook."""
        return f"<pre>{escape(str(self))}</pre>"


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. ``document`` is that of ``evaluate --json``."""

    document: JsonObject

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics over all rows."""
        return dict(self.document["targets"][0]["metrics"][0])

    @property
    def drop(self) -> float | None:
        """The loss of the metric against the prompt's own test split; None if unknown."""
        drop: float | None = self.document["targets"][0]["drop"][0]
        return drop

    @property
    def groups(self) -> pandas.DataFrame:
        """A data frame with the metrics of each value of the column ``by``."""
        import pandas

        rows = {
            target["group"]: {"rows": target["rows"], **target["metrics"][0]}
            for target in self.document["targets"]
            if target["group"] is not None
        }
        return pandas.DataFrame.from_dict(rows, orient="index")

    @property
    def labels(self) -> pandas.DataFrame:
        """A data frame with precision, recall, F1 and rows of each label, if there are labels."""
        import pandas

        figures = self.document["targets"][0]["classes"][0] or []
        frame = pandas.DataFrame(figures)
        return frame.set_index("label") if figures else frame

    def __str__(self) -> str:
        from orchestrator.cli.pages.comparison import shift_page

        return "\n".join(shift_page(self.document))

    def __repr__(self) -> str:
        metric = self.document["metric"]
        return f"<Evaluation: {metric} {self.metrics[metric]:.3f}>"

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def _say(text: str) -> None:
    """Show what takes a while, on standard error."""
    print(text, file=sys.stderr)  # noqa: T201


for public in (RegisteredPrompt, Evaluation):
    public.__module__ = "orchestrator"
