"""The model that MLflow itself loads (``mlflow.pyfunc``, ``mlflow models serve``).

A copy of this file is stored with each version. MLflow runs it as a model from code, so nothing is
pickled. Our own server never loads it; it reads the two files of the artifact.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from orchestrator.artifact import read_manifest


class PromptModel(PythonModel):
    """A model whose input has one column for each column of the template."""

    def load_context(self, context: Any) -> None:
        self.folder = Path(context.artifacts["prompt"])
        self.model: Any = None

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[Any]:
        """Return ``{"label", "probs"}`` for each row.

        A prompt that generates text returns ``{"text"}`` for each row.
        """
        rows = model_input.to_dict("records")
        if self.model is None:
            # Loading the backbone waits for the first row: reading a model's metadata must stay
            # cheap.
            from orchestrator.serving.offline import OfflineModel

            self.model = OfflineModel.from_artifact(self.folder)
        if read_manifest(self.folder).verbalizer is None:
            return [{"text": completion.text} for completion in self.model.complete(rows)]
        return list(self.model.classify(rows))


set_model(PromptModel())
