"""Generation of a mixed batch, one token a step: each row with its own prompt, sampling and end.

Shapes: B rows still running, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from orchestrator.backbone import Backbone
from orchestrator.decoding import start
from orchestrator.placing import text_ids
from orchestrator.serving.served_prompt import ServedPrompt, stack_prompts

GREEDY_BELOW = 1e-4  # a smaller temperature divides the logits out of float32's range, and is greedy anyway
CONTEXT_TOKENS = 6  # enough in front of the new tokens for any decoder to treat them as a continuation


@dataclass(frozen=True)
class Sampling:
    """How a row goes on: greedy at temperature 0, otherwise drawn from the smallest set of tokens that holds top_p."""

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Completion:
    """What a row became: ``text`` without end token and stop string; ``tokens`` made, the end token included."""

    text: str
    finish_reason: Literal["stop", "length"]
    tokens: int


@dataclass(eq=False)
class GenerationRow:
    """One row on its way through a batch."""

    prompt: ServedPrompt
    input_ids: list[int]
    sampling: Sampling
    made: list[int] = field(default_factory=list)
    completion: Completion | None = None
    abandoned: bool = False
    """Nobody waits for it any more."""

    def __post_init__(self) -> None:
        self._random = torch.Generator()
        if self.sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(self.sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token from logits [V], float32 on the CPU. Drawn by the row's own generator, so that the batch's
        other rows don't matter.
        """
        if self.sampling.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        probs, order = (logits / self.sampling.temperature).softmax(-1).sort(descending=True)
        # Kept while what stands before it is less than top_p; the first always is.
        kept = probs * ((probs.cumsum(-1) - probs) < self.sampling.top_p)
        return int(order[torch.multinomial(kept, 1, generator=self._random)])

    def take(self, token: int) -> None:
        """Append a token; sets ``completion`` when the row ends with it."""
        self.made.append(token)
        if token == self.prompt.encoder.end_id:
            self.completion = Completion(self.text(self.made[:-1]), "stop", len(self.made))
        elif (text := self._stopped()) is not None:
            self.completion = Completion(text, "stop", len(self.made))
        elif len(self.made) >= self.sampling.max_tokens:
            self.completion = Completion(self.text(self.made), "length", len(self.made))

    def _stopped(self) -> str | None:
        """The text before the first stop string, when there is one."""
        if not self.sampling.stop:
            return None
        text = self.text(self.made)
        found = [place for stop in self.sampling.stop if (place := text.find(stop)) >= 0]
        return text[: min(found)] if found else None

    def text(self, tokens: Sequence[int]) -> str:
        """Text of new tokens as they follow the input: decoded alone they may lose their leading space.

        A model with a decoder of its own begins a text of its own.
        """
        alone = self.prompt.encoder.family == "seq2seq"
        before = [] if alone else text_ids(self.input_ids)[-CONTEXT_TOKENS:]
        head, whole = self._decoded(before), self._decoded([*before, *tokens])
        return whole[len(head) :] if whole.startswith(head) else self._decoded(tokens)

    def _decoded(self, tokens: Sequence[int]) -> str:
        # Cleaned-up spaces ("a ." to "a.") would be another text than the one that was generated.
        decode = self.prompt.encoder.tokenizer.decode
        return str(decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class GenerationBatch:
    """Rows of different prompts that generate together; a row leaves when it is done."""

    @torch.inference_mode()
    def __init__(self, backbone: Backbone, rows: Sequence[GenerationRow]) -> None:
        self.rows = list(rows)
        prompts, place = stack_prompts([row.prompt for row in rows])
        self._state = start(backbone, prompts, [row.input_ids for row in rows], place)

    @torch.inference_mode()
    def step(self) -> list[GenerationRow]:
        """One token for every row; returns the rows that ended, which are out of the batch now."""
        logits = self._state.logits.float().cpu()
        for row, scores in zip(self.rows, logits, strict=True):
            if not row.abandoned:
                row.take(row.choose(scores))
        done = [row for row in self.rows if row.completion is not None or row.abandoned]
        going = [place for place, row in enumerate(self.rows) if row.completion is None and not row.abandoned]
        self.rows = [self.rows[place] for place in going]
        if self.rows:
            self._go_on(going if done else None)
        return done

    def _go_on(self, places: list[int] | None) -> None:
        """Feed the rows their last tokens; ``places`` are theirs in the state, where others have left it."""
        device = self._state.logits.device
        if places is not None:  # selecting copies the cache
            self._state = self._state.select(torch.tensor(places, device=device))
        self._state = self._state.extend(torch.tensor([row.made[-1] for row in self.rows], device=device))
