"""Generation in a mixed batch, one token per step; rows have their own prompt, sampling and end.

Shapes: B rows still running, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from orchestrator.models.backbone import Backbone
from orchestrator.models.decoding import start
from orchestrator.models.placeholders import text_ids
from orchestrator.serving.engine.constraints import Constraint, ConstraintFailed
from orchestrator.serving.engine.detokenize import RowText
from orchestrator.serving.engine.input_scores import ScoredToken
from orchestrator.serving.engine.logit_rules import UNCHANGED, LogitRules, truncated, without
from orchestrator.serving.prompts.served_prompt import ServedPrompt, stack_prompts

# A smaller temperature would overflow float32 when logits are divided by it, and is greedy anyway.
GREEDY_BELOW = 1e-4
# Extra characters to search again for stop strings: an unfinished character at the end of the text
# may have changed since the last search.
CONTEXT_CHARACTERS = 8

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """The rule that chooses a row's next tokens.

    Temperature 0 is greedy. Otherwise each token is drawn from the smallest set of likeliest tokens
    whose probabilities add up to at least ``top_p``.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    """How many of the likeliest tokens to report at each position, besides the chosen one.

    None reports no log-probabilities.
    """
    rules: LogitRules = UNCHANGED
    """Biases and penalties, which also apply to greedy decoding."""
    top_k: int = 0
    """How many of the likeliest tokens to draw from; 0 draws from all."""
    min_p: float = 0.0
    """The smallest probability of a token that is drawn, as a share of the likeliest token's."""
    ignore_eos: bool = False
    """Go on after the end token."""
    min_tokens: int = 0
    """The number of tokens before which neither a token nor a string ends the row."""
    stop_token_ids: frozenset[int] = frozenset()
    """Further tokens that end the row."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens to report for each token of the input.

    None does not score the input.
    """
    constraint: Constraint | None = None
    """What the texts have to satisfy. A row ends as soon as nothing may follow its text."""

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @cached_property
    def takes_likeliest(self) -> bool:
        """Tell whether every token is the likeliest one of the model's own logits."""
        is_free = self.constraint is None and not self.min_tokens
        return self.greedy and self.rules.changes_nothing and is_free

    @cached_property
    def plain(self) -> bool:
        """Tell whether the likeliest token is all that is needed at each step."""
        return self.takes_likeliest and self.logprobs is None


@dataclass(frozen=True)
class TokenLogprob:
    """One token of a row, its log-probability at temperature 1, and the likeliest tokens."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]
    offset: int
    """The position in the row's text at which the token begins."""


@dataclass(frozen=True)
class Completion:
    """The result of a row.

    ``text`` contains neither the end token nor a stop string; ``tokens`` counts the end token.
    """

    text: str
    finish_reason: FinishReason
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    input_scores: tuple[ScoredToken, ...] = ()


@dataclass(frozen=True)
class Delta:
    """What a row gained since its last delta: text, tokens, and at the end the reason it ended."""

    text: str
    tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    input_scores: tuple[ScoredToken, ...] = ()
    """The scores of the input, in the row's first delta only."""


@dataclass(eq=False)
class GenerationRow:
    """One row while it is generated in a batch."""

    prompt: ServedPrompt
    input_ids: list[int]
    sampling: Sampling
    made: list[int] = field(default_factory=list)
    completion: Completion | None = None
    failure: Exception | None = None
    """The error that ended this row and no other row of the batch."""
    abandoned: bool = False
    """Set when no caller waits for the row any more."""
    input_scores: tuple[ScoredToken, ...] = ()

    def __post_init__(self) -> None:
        # A seq2seq model's decoder starts a new text; other models continue the input's text.
        alone = self.prompt.encoder.family == "seq2seq"
        self._text = RowText(
            self.prompt.encoder.tokenizer, [] if alone else text_ids(self.input_ids)
        )
        self._logprobs: list[TokenLogprob] = []
        self._told = Delta("", 0)
        constraint = self.sampling.constraint
        self._guide = None if constraint is None else constraint.start()
        self._stops_from = 0  # stop strings that end before this position are part of the text

    @cached_property
    def _random(self) -> torch.Generator:
        generator = torch.Generator()
        if self.sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.sampling.seed)
        return generator

    @property
    def over(self) -> bool:
        return self.completion is not None or self.failure is not None or self.abandoned

    def choose(self, logits: Tensor) -> int:
        """Choose the next token from logits [V], float32 on the CPU.

        The row has its own random generator, so the result does not depend on the other rows.
        """
        logits = self._allowed(self._ruled(logits))
        if self.sampling.greedy:
            return int(logits.argmax())
        # Temperatures and top_p below float32's range would become zero.
        temperature = max(self.sampling.temperature, torch.finfo(torch.float32).tiny)
        scaled = (logits - logits.max()) / temperature
        probs, order = scaled.softmax(-1).sort(descending=True)
        if self.sampling.top_k or self.sampling.min_p:
            probs = truncated(probs, self.sampling.top_k, self.sampling.min_p)
        # A token is kept while the likelier tokens add up to less than top_p; the first always is.
        is_kept = (probs.cumsum(-1) - probs) < self.sampling.top_p
        is_kept[0] = True
        return int(order[torch.multinomial(probs * is_kept, 1, generator=self._random)])

    def _ruled(self, logits: Tensor) -> Tensor:
        """Return the logits [V] after the request's own changes."""
        if len(self.made) < self.sampling.min_tokens:
            end_id = self.prompt.encoder.end_id
            logits = without(
                logits,
                [*self.sampling.stop_token_ids, *([] if end_id is None else [end_id])],
            )
        if self.sampling.rules.changes_nothing:
            return logits
        return self.sampling.rules.applied(logits, text_ids(self.input_ids), self.made)

    def _allowed(self, logits: Tensor) -> Tensor:
        """Return the logits [V] with minus infinity for tokens that the constraint rules out."""
        if self._guide is None:
            return logits
        logits = logits.masked_fill(~self._guide.allowed(len(logits)), -torch.inf)
        if not bool((logits > -torch.inf).any()):
            raise ConstraintFailed(
                "min_tokens asks for a longer text than the requested structure allows",
                "lower min_tokens",
            )
        return logits

    def go_on(self, logits: Tensor, greedy: int) -> None:
        """Take one step from logits [V], of which ``greedy`` is the likeliest token.

        An error becomes this row's ``failure``; the other rows of the batch go on.
        """
        try:
            token = greedy if self.sampling.takes_likeliest else self.choose(logits)
            if self.sampling.logprobs is not None:
                self._logprobs.append(self._logprob(logits, token))
            self.take(token)
        except Exception as error:
            self.failure = error

    def take(self, token: int) -> None:
        """Append a token, and set ``completion`` if the row ends with it."""
        self.made.append(token)
        if self._is_end(token):
            self._end(self._text.text, "stop")
            return
        before = len(self._text.text) if self.sampling.stop else 0
        self._text.add(token)
        is_complete = self._guide is not None and self._guide.take(token)
        if (text := self._stopped(before)) is not None:
            self._end(text, "stop")
        elif is_complete:
            self._end(self._text.text, "stop")
        elif len(self.made) >= self.sampling.max_tokens:
            self._end(self._text.text, "length")

    def _is_end(self, token: int) -> bool:
        if token in self.sampling.stop_token_ids:
            return True
        # Behind a structure nothing may follow, so the end token ends it in any case.
        goes_on = self.sampling.ignore_eos and self._guide is None
        return token == self.prompt.encoder.end_id and not goes_on

    def end_at_once(self) -> None:
        """Set ``completion`` of a row that was asked for no tokens."""
        self._end("", "length")

    def pull(self) -> Delta | None:
        """Return what became final since the last call, or None if nothing did.

        The texts of all deltas together are the text of the completion.
        """
        completion = self.completion
        text = completion.text if completion else self._text.shown(self.sampling.stop)
        previous = self._told
        news = Delta(
            text[len(previous.text) :],
            len(self.made) - previous.tokens,
            tuple(self._logprobs[len(previous.logprobs) :]),
            completion.finish_reason if completion else None,
            () if previous.tokens else self.input_scores,
        )
        if not (news.text or news.logprobs or completion):
            return None
        self._told = Delta(max(text, previous.text, key=len), len(self.made), tuple(self._logprobs))
        return news

    def _end(self, text: str, reason: FinishReason) -> None:
        self.completion = Completion(
            text, reason, len(self.made), tuple(self._logprobs), self.input_scores
        )

    def _stopped(self, previous_length: int) -> str | None:
        """Return the text before the first stop string, or None if there is no stop string.

        The first ``previous_length`` characters were searched in an earlier call.
        """
        if not self.sampling.stop:
            return None
        text = self._text.text
        if len(self.made) <= self.sampling.min_tokens:
            self._stops_from = len(text)
            return None
        start = max(0, previous_length - max(map(len, self.sampling.stop)) - CONTEXT_CHARACTERS)
        positions = (
            text.find(stop, max(start, self._stops_from - len(stop) + 1))
            for stop in self.sampling.stop
        )
        first = min((position for position in positions if position >= 0), default=None)
        return None if first is None else text[:first]

    def _logprob(self, logits: Tensor, token: int) -> TokenLogprob:
        scores = logits.log_softmax(-1)
        values, ids = scores.topk(min(self.sampling.logprobs or 0, len(scores)))
        top = tuple(
            (self._piece(token_id), value)
            for token_id, value in zip(ids.tolist(), values.tolist(), strict=True)
        )
        return TokenLogprob(self._piece(token), float(scores[token]), top, len(self._text.text))

    def _piece(self, token: int) -> str:
        return str(
            self.prompt.encoder.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        )


class GenerationBatch:
    """Rows of different prompts that generate together.

    A row leaves the batch when it is done; other rows may join.
    """

    @torch.inference_mode()
    def __init__(self, backbone: Backbone, rows: Sequence[GenerationRow]) -> None:
        self.rows = list(rows)
        # Several completions of one input run it once.
        keys = [(id(row.prompt), id(row.input_ids)) for row in rows]
        distinct = list(dict(zip(keys, rows, strict=True)).values())
        prompts, prompt_of_row = stack_prompts([row.prompt for row in distinct])
        self._state = start(backbone, prompts, [row.input_ids for row in distinct], prompt_of_row)
        if len(distinct) < len(rows):
            order = {key: index for index, key in enumerate(dict.fromkeys(keys))}
            copies = torch.tensor([order[key] for key in keys], device=self._state.logits.device)
            self._state = self._state.select(copies)

    @torch.inference_mode()
    def absorb(self, other: GenerationBatch) -> bool:
        """Add the other batch's rows; return False if the model can't run them in one forward."""
        joined = self._state.join(other._state)
        if joined is None:
            return False
        self._state = joined
        self.rows += other.rows
        return True

    @torch.inference_mode()
    def step(self) -> list[GenerationRow]:
        """Generate one token for every row; return the rows that ended, removed from the batch."""
        logits = self._state.logits.float()
        likeliest = logits.argmax(-1).tolist()
        plain = all(row.sampling.plain for row in self.rows)
        scores = logits if plain else logits.cpu()
        for row, row_scores, greedy in zip(self.rows, scores, likeliest, strict=True):
            if not row.abandoned:
                row.go_on(row_scores, greedy)
        ended = [row for row in self.rows if row.over]
        continuing = [row_index for row_index, row in enumerate(self.rows) if not row.over]
        self.rows = [self.rows[row_index] for row_index in continuing]
        if self.rows:
            self._go_on(continuing if ended else None)
        return ended

    def _go_on(self, places: list[int] | None) -> None:
        """Run the model on the last token of every row.

        ``places`` are the positions of these rows in the state; None if no row has left the batch.
        """
        device = self._state.logits.device
        if places is not None:  # selecting copies the cache
            self._state = self._state.select(torch.tensor(places, device=device))
        self._state = self._state.extend(
            torch.tensor([row.made[-1] for row in self.rows], device=device)
        )
