"""P-tuning: virtual tokens pass through a small network before they enter the model.

Liu et al. 2021, section 3.2. Shapes: P virtual tokens, H width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orchestrator.job.space import TrialSpec
from orchestrator.models.backbone import PromptTensors
from orchestrator.tuning.prompts.base import Method, Offset, Prompt, seeded
from orchestrator.tuning.prompts.inits import InitContext, initial_prompt


class LstmEncoder(nn.Module):
    """An encoder from [P, H] to [P, H]: two bidirectional LSTM layers, then Linear-ReLU-Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.first = nn.Linear(2 * hidden, 2 * hidden)
        self.last = nn.Linear(2 * hidden, width)

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings: Tensor = self.last(self.first(self.lstm(inputs[None])[0][0]).relu())
        return embeddings


class MlpEncoder(nn.Module):
    """An encoder from [P, H] to [P, H]: Linear-ReLU-Linear-ReLU-Linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, width)

    def forward(self, inputs: Tensor) -> Tensor:
        embeddings: Tensor = self.last(self.middle(self.first(inputs).relu()).relu())
        return embeddings


class EncodedPrompt(Prompt):
    """A prompt computed by an encoder from ``tokens`` [P, H].

    The tokens and the encoder's weights are trained. After training, only the encoder's output
    [P, H] is needed.
    """

    def __init__(
        self, start: Tensor | None, tokens: Tensor, encoder: LstmEncoder | MlpEncoder, inside: bool
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens)
        self.encoder = Offset(encoder, encoder.last, start)
        self.inside = inside

    @classmethod
    def create(cls, method: Method, spec: TrialSpec, context: InitContext) -> EncodedPrompt:
        """Create a trial's prompt before its first step.

        With init ``random``, everything is drawn at random, as in the paper's code. With any other
        init, the prompt starts exactly from the soft prompt of that init.
        """
        width = context.shape[1]
        start = None if spec.init == "random" else initial_prompt(spec, context)
        with seeded(spec.seed):
            tokens = torch.randn(spec.num_virtual_tokens, width)
            if method.reparameterization == "lstm":
                encoder: LstmEncoder | MlpEncoder = LstmEncoder(
                    width, method.hidden_size or max(1, width // 2)
                )
            else:
                encoder = MlpEncoder(width, method.hidden_size or width)
            return cls(start, tokens, encoder, method.inside)

    def forward(self) -> PromptTensors:
        return PromptTensors(self.encoder(self.tokens), inside=self.inside)
