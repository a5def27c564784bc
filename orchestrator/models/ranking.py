"""Ranking of answers of several tokens by their log-probabilities, as a tree of their tokens.

Answers that begin alike share the forwards of their beginning (``answer_tree.py``). An answer is
never likelier than its beginning, so the likeliest answer is found without running beginnings that
are already less likely than the best complete answer. The first of equally likely answers wins.

A row's continuations are run in one of three ways:

* **branches**: all in one forward, where every token attends to its row's cache and to the tokens
  that precede it in the tree. The cache is read, not copied. Causal models with the prompt-once
  path do this.
* **copies**: each on a copy of its row's state, in encoder-decoder models.
* **whole rows**: each as a row of its own, on the plain path.

Memory does not grow with the number of answers, because the tree is run in pieces.

Shapes: B rows, M nodes of a tree, C answers, D tokens of the longest answer, Y target tokens, n new
columns, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self, cast

import torch
from torch import Tensor

from orchestrator.models.answer_tree import AnswerTrees
from orchestrator.models.backbone import Backbone, CausalBackbone, PreparedPrompts
from orchestrator.models.backbone.base import RowState
from orchestrator.models.backbone.causal import CausalState

Ids = Sequence[int]

FORWARD_TOKENS = 2048
"""Maximum number of tokens in a forward of continuations, unless every row has only one."""
LOGITS = 1 << 25
"""Maximum number of logits that such a forward returns, with the same exception."""
KEPT_COLUMNS = 64
"""Columns of continuations that a row's cache keeps; beyond, beginnings are run again."""
ROOM = 32
"""Columns that are reserved for continuations in advance."""
BEST_FIRST = 8
"""Maximum number of a row's beginnings that are run at once in search of the likeliest answer.

Fewer would take more forwards, more would run beginnings that turn out to be needless."""
PIECE = 16
"""Number of a row's continuations in a forward of a sharded model.

Its workers must run equally many forwards, so that the number may not depend on the rows."""


@dataclass(frozen=True)
class Ranking:
    """The ranking of the answers of each row."""

    scores: Tensor
    """Log-probability of each answer, [B, C], in float32; minus infinity beyond a row's answers.

    Unless all were asked for, it is also minus infinity for answers that can't be the likeliest."""
    given: Tensor
    """Index of the likeliest answer, [B]; the first of equally likely ones."""
    logits: Tensor
    """Logits [B, Y, V] that predict the targets."""
    targets: Tensor
    """The targets [B, Y], padded with -100."""


def rank(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Ids],
    prompt: Sequence[int],
    trees: AnswerTrees,
    right: tuple[Sequence[Ids], Sequence[int]] | None = None,
    every: bool = True,
) -> Ranking:
    """Rank the answers of each row, which are in ``trees`` [B].

    ``right`` is each row's target, and which of its answers the target is. The target may have
    further tokens after the answer. It is then run together with the input, and its log-probability
    is the first that others have to reach. ``every`` asks for the scores of all answers. The model
    may not be a masked one.
    """
    runs = _runs_of(backbone, prompts, inputs, prompt)
    targets, answers = right or ([[0]] * len(inputs), [-1] * len(inputs))
    logits, padded, nodes = runs.start(trees, targets, answers)
    found = _Found.nothing(trees)
    found.learn(torch.arange(len(inputs), device=padded.device), nodes, logits)
    if every or backbone.sharded:
        _run_all(runs, found, backbone.sharded)
    else:
        _run_best_first(runs, found)
    scores = found.scores()
    return Ranking(scores, scores.argmax(1), logits, padded)


@dataclass(frozen=True)
class _Found:
    """What is known so far about the rows' answers.

    ``steps`` [B, M] is the log-probability of each node's token after its beginning, and ``done``
    [B, M] is true for nodes that were run, whose children's steps are known.
    """

    trees: AnswerTrees
    steps: Tensor
    done: Tensor

    @classmethod
    def nothing(cls, trees: AnswerTrees) -> _Found:
        steps = torch.zeros(trees.tokens.shape, device=trees.tokens.device)
        return cls(trees, steps, torch.zeros_like(steps, dtype=torch.bool))

    def learn(self, rows: Tensor, nodes: Tensor, logits: Tensor) -> None:
        """Take in the logits [R, n, V] after the nodes [R, n] of the given rows [R].

        Nodes that were run before keep their values.
        """
        row_of_node = rows[:, None].expand_as(nodes)
        new = ~self.done[row_of_node, nodes]
        counts = (self.trees.counts[row_of_node, nodes] * new).flatten()
        source = torch.repeat_interleave(counts)
        place = torch.arange(len(source), device=source.device)
        child = self.trees.first[row_of_node, nodes].flatten()[source]
        child = child + place - (counts.cumsum(0) - counts)[source]
        row = row_of_node.flatten()[source]
        token = self.trees.tokens[row, child]
        values = logits.flatten(0, 1)[source, token].float()
        self.steps[row, child] = values - logits.float().logsumexp(-1).flatten()[source]
        self.done[row_of_node, nodes] = True

    @property
    def known(self) -> Tensor:
        """True for nodes whose log-probability is known, [B, M]."""
        return self.done.gather(1, self.trees.parents)

    @property
    def reached(self) -> Tensor:
        """The log-probability of each known node, [B, M]."""
        rows, nodes, tokens = self.trees.paths.shape
        return self.steps.gather(1, self.trees.paths.flatten(1)).view(rows, nodes, tokens).sum(-1)

    def scores(self, reached: Tensor | None = None) -> Tensor:
        """Return the log-probability of each answer, [B, C]; minus infinity where it is unknown."""
        ends = self.trees.ends.clamp(min=0)
        complete = self.known.gather(1, ends) & (self.trees.ends >= 0)
        reached = self.reached if reached is None else reached
        return reached.gather(1, ends).masked_fill(~complete, -torch.inf)

    def promising(self, most: int) -> Tensor:
        """Return the nodes to run next, [B, M]: the likeliest ``most`` of each row.

        Only those count that are at least as likely as the row's best complete answer.
        """
        reached = self.reached
        best = self.scores(reached).amax(1, keepdim=True)
        candidates = (self.trees.counts > 0) & self.known & ~self.done & (reached >= best)
        # A node that can't be reached comes before nodes that are no candidates.
        worst = torch.finfo(reached.dtype).min
        value = reached.clamp(min=worst).masked_fill(~candidates, -torch.inf)
        chosen = value.topk(min(most, value.shape[1]), dim=1).indices
        return torch.zeros_like(candidates).scatter(1, chosen, True) & candidates

    def select(self, rows: Tensor) -> _Found:
        return _Found(self.trees.select(rows), self.steps[rows], self.done[rows])

    def take(self, rows: Tensor, part: _Found) -> None:
        """Take over what was found for the given rows."""
        self.steps[rows], self.done[rows] = part.steps, part.done


def _run_all(runs: _Runs, found: _Found, sharded: bool) -> None:
    """Run all nodes, in pieces of the tree."""
    order = runs.order(found.trees)
    size = PIECE if sharded else runs.most(len(order))
    for start in range(0, int(order.max()) + 1, size):
        chosen = (order >= start) & (order < start + size)
        if not sharded:
            chosen &= ~runs.finished(found)
            if not bool(chosen.any()):
                continue
        found.learn(*runs.run(found.trees, chosen))


def _run_best_first(runs: _Runs, found: _Found) -> None:
    """Run nodes until no answer that is still unknown can be the likeliest of its row."""
    while True:
        chosen = found.promising(min(BEST_FIRST, runs.most(len(found.done))))
        unfinished = chosen.any(1).nonzero()[:, 0]
        if not len(unfinished):
            return
        if 2 * len(unfinished) <= len(chosen):
            part = found.select(unfinished)
            _run_best_first(runs.select(unfinished), part)
            found.take(unfinished, part)
            return
        found.learn(*runs.run(found.trees, chosen))


class _Runs(ABC):
    """Runs of the rows' inputs and of continuations after them."""

    def start(
        self, trees: AnswerTrees, targets: Sequence[Ids], answers: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the inputs with their targets.

        Returns logits and targets like ``teacher_forced``, and the nodes [B, Y] that were run. For
        ``answers``, see ``_nodes_of_targets``.
        """
        logits, padded = self._forced(targets)
        return (
            logits,
            padded,
            _nodes_of_targets(trees, padded, torch.tensor(answers, device=padded.device)),
        )

    @abstractmethod
    def _forced(self, targets: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        """Run the inputs with their targets; return logits and targets like ``teacher_forced``."""

    @abstractmethod
    def run(self, trees: AnswerTrees, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the chosen nodes [B, M]; return what ``_Found.learn`` takes."""

    @abstractmethod
    def most(self, rows: int) -> int:
        """Return how many nodes of each of so many rows fit into a forward."""

    @abstractmethod
    def select(self, rows: Tensor) -> Self:
        """Return the runs of the given rows; the others can't be continued afterwards."""

    def order(self, trees: AnswerTrees) -> Tensor:
        """Return the order of the nodes to choose for running all nodes; -1 for others."""
        return trees.chain_order

    def finished(self, found: _Found) -> Tensor:
        """Return the nodes [B, M] that need not be chosen any more."""
        return found.done.gather(1, found.trees.chains)


def _runs_of(
    backbone: Backbone,
    prompts: PreparedPrompts | None,
    inputs: Sequence[Ids],
    prompt: Sequence[int],
) -> _Runs:
    rows = _Started(backbone, prompts, inputs, prompt)
    if backbone.branches:
        return _Branches(rows)
    return _Copies(rows) if backbone.continues else _WholeRows(rows)


@dataclass(frozen=True)
class _Started:
    """The rows to rank answers for."""

    backbone: Backbone
    prompts: PreparedPrompts | None
    inputs: Sequence[Ids]
    prompt: Sequence[int]

    def select(self, rows: Tensor) -> _Started:
        places = rows.tolist()
        return replace(
            self,
            inputs=[self.inputs[row] for row in places],
            prompt=[self.prompt[row] for row in places],
        )

    @property
    def width(self) -> int:
        prompt = 0 if self.prompts is None else self.prompts.width
        return prompt + max(map(len, self.inputs))

    def most(self, rows: int, tokens: int, logits: int) -> int:
        """Return how many continuations of each row fit into a forward.

        A continuation runs so many tokens and returns the logits of so many.
        """
        by_logits = LOGITS // (rows * logits * len(self.backbone.table))
        return max(1, min(FORWARD_TOKENS // (rows * tokens), by_logits))


class _Branches(_Runs):
    """Continuations that read their row's cache, many in one forward.

    ``columns`` [B, M] is the column of each node in the cache, or -1. The root's column is that of
    the input's last token.
    """

    state: CausalState
    columns: Tensor
    width: int
    """Number of columns of the cache."""

    def __init__(self, rows: _Started) -> None:
        self.rows = rows
        self.backbone = cast(CausalBackbone, rows.backbone)

    def start(
        self, trees: AnswerTrees, targets: Sequence[Ids], answers: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, padded, nodes = super().start(trees, targets, answers)
        # The logits of the last columns were read, which end with each target's last run token.
        columns = self.width + torch.arange(-nodes.shape[1], 0, device=nodes.device)
        self.columns = torch.full_like(trees.tokens, -1).scatter(1, nodes, columns.expand_as(nodes))
        return logits, padded, nodes

    def _forced(self, targets: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        rows = self.rows
        logits, padded, self.state = self.backbone.start_along(
            rows.prompts, rows.inputs, targets, rows.prompt, ROOM
        )
        self.width = self.state.mask.shape[1]
        return logits, padded

    def order(self, trees: AnswerTrees) -> Tensor:
        return trees.order

    def finished(self, found: _Found) -> Tensor:
        return found.done

    def most(self, rows: int) -> int:
        return self.rows.most(rows, 1, 1)

    def select(self, rows: Tensor) -> Self:
        part = type(self)(self.rows.select(rows))
        part.state, part.columns = self.state.select(rows), self.columns[rows]
        part.width = self.width
        return part

    def run(self, trees: AnswerTrees, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.width - self.state.mask.shape[1] >= KEPT_COLUMNS:
            self._forget()
        nodes = _listed(self._with_beginnings(trees, chosen), trees.dummy)
        count = nodes.shape[1]
        new = self.width + torch.arange(count, device=nodes.device)
        self.columns.scatter_(1, nodes, new.expand_as(nodes))
        logits = self.backbone.branch(
            self.state,
            trees.tokens.gather(1, nodes),
            self.state.positions[:, None] + trees.depths.gather(1, nodes) - 1,
            self._sees(trees, nodes),
        )
        self.width += count
        return torch.arange(len(nodes), device=nodes.device), nodes, logits

    def _with_beginnings(self, trees: AnswerTrees, chosen: Tensor) -> Tensor:
        """Add the nodes that precede chosen ones and are not in the cache."""
        needed, lacking = chosen, self.columns < 0
        for _ in range(trees.paths.shape[2] - 1):
            parents = torch.where(needed, trees.parents, trees.dummy)
            before = torch.zeros_like(chosen).scatter(1, parents, True) & lacking
            before[:, trees.dummy] = False
            needed = needed | before
        return needed

    def _sees(self, trees: AnswerTrees, nodes: Tensor) -> Tensor:
        """Return the columns that each node attends to, [B, n, C + n]: input, path and itself."""
        rows, count = nodes.shape
        index = nodes[:, :, None].expand(-1, -1, trees.paths.shape[2])
        paths = trees.paths.gather(1, index)
        columns = self.columns.gather(1, paths.flatten(1)).view(paths.shape)
        mask = self.state.mask
        sees = mask.new_zeros(rows, count, self.width + count)
        sees[:, :, : mask.shape[1]] = mask[:, None]
        return sees.scatter(2, columns, True)

    def _forget(self) -> None:
        from orchestrator.models.backbone import cache

        self.width = self.state.mask.shape[1]
        cache.crop(self.state.cache, self.width)
        self.columns.masked_fill_(self.columns >= self.width, -1)


def _listed(chosen: Tensor, dummy: int) -> Tensor:
    """Return the chosen nodes of each row [B, n], padded with the dummy."""
    numbers = torch.arange(chosen.shape[1], device=chosen.device)
    listed = torch.where(chosen, numbers, dummy).sort(1).values
    return listed[:, : max(1, int(chosen.sum(1).max()))]


class _Copies(_Runs):
    """Continuations that each have a copy of their row's state."""

    state: RowState

    def __init__(self, rows: _Started) -> None:
        self.rows = rows

    def _forced(self, targets: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        rows, backbone = self.rows, self.rows.backbone
        self.state = backbone.start(rows.prompts, rows.inputs, rows.prompt)
        longest = max(map(len, targets))
        padded = torch.tensor(
            [[*target, *[-100] * (longest - len(target))] for target in targets],
            device=backbone.device,
        )
        logits = self.state.logits[:, None]
        if longest > 1:
            copy = self.state.select(torch.arange(len(targets), device=backbone.device))
            fed = padded[:, 1:] >= 0
            later, _ = backbone.extend(copy, padded[:, :-1].clamp(min=0), fed)
            logits = torch.cat([logits, later], dim=1)
        return logits, padded

    def run(self, trees: AnswerTrees, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, paths, real, nodes = _chains(trees, chosen)
        ids = trees.tokens[rows[:, None], paths] * real
        logits, _ = self.rows.backbone.extend(self.state.select(rows), ids, real)
        return rows, nodes, logits

    def most(self, rows: int) -> int:
        return self.rows.most(rows, self.rows.width, 2)

    def select(self, rows: Tensor) -> Self:
        part = type(self)(self.rows.select(rows))
        part.state = self.state.select(rows)
        return part


class _WholeRows(_Runs):
    """Continuations that each run their row's input again."""

    def __init__(self, rows: _Started) -> None:
        self.rows = rows

    def _forced(self, targets: Sequence[Ids]) -> tuple[Tensor, Tensor]:
        rows = self.rows
        return rows.backbone.teacher_forced(rows.prompts, rows.inputs, targets, rows.prompt)

    def run(self, trees: AnswerTrees, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, paths, real, nodes = _chains(trees, chosen)
        started = self.rows.select(rows)
        beginnings = [
            path[:length]
            for path, length in zip(
                trees.tokens[rows[:, None], paths].tolist(), real.sum(1).tolist(), strict=True
            )
        ]
        logits, targets = started.backbone.teacher_forced(
            started.prompts, started.inputs, [[*ids, 0] for ids in beginnings], started.prompt
        )
        # A target's first token is predicted after the input, and the next after the first node.
        after = torch.cat([torch.full_like(nodes[:, :1], trees.dummy), nodes], dim=1)
        place = (targets >= 0).long().cumsum(1) - 1
        aligned = after.gather(1, place.clamp(min=0)).masked_fill(place < 0, trees.dummy)
        return rows, aligned, logits

    def most(self, rows: int) -> int:
        return self.rows.most(rows, self.rows.width, 2)

    def select(self, rows: Tensor) -> Self:
        return type(self)(self.rows.select(rows))


def _chains(trees: AnswerTrees, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the chains that begin at the chosen nodes, each as a path from below the root.

    The result is each path's row [R], its nodes [R, n], where the path has nodes [R, n], and the
    nodes of the chain itself, with the dummy elsewhere.
    """
    rows, heads = chosen.nonzero(as_tuple=True)
    ends = trees.chains[rows, heads]
    lengths = trees.depths[rows, ends]
    paths = trees.paths[rows, ends][:, : int(lengths.max())]
    depth = 1 + torch.arange(paths.shape[1], device=paths.device)
    real = depth <= lengths[:, None]
    in_chain = real & (depth >= trees.depths[rows, heads][:, None])
    return rows, paths, real, paths.masked_fill(~in_chain, trees.dummy)


def _nodes_of_targets(trees: AnswerTrees, targets: Tensor, answers: Tensor) -> Tensor:
    """Return the node at which each target token is predicted, [B, Y]; the dummy elsewhere.

    ``answers`` [B] are the answers that the targets begin with, or -1 for targets of one token.
    """
    ends = trees.ends.gather(1, answers.clamp(min=0)[:, None])
    paths = trees.paths.gather(1, ends[:, :, None].expand(-1, -1, trees.paths.shape[2]))[:, 0]
    beginnings = torch.cat([paths.new_zeros(len(paths), 1), paths], dim=1)
    last = torch.where(answers[:, None] >= 0, trees.depths.gather(1, ends), 0)
    real = targets >= 0
    place = real.long().cumsum(1) - 1
    inside = real & (place <= last)
    return beginnings.gather(1, place.clamp(0, beginnings.shape[1] - 1)).masked_fill(
        ~inside, trees.dummy
    )
