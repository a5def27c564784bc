"""Answers as trees of their tokens, so that what several answers share is computed once.

A node stands for the beginning of answers, and its children for the tokens that may follow. The
root is node 0. Nodes are numbered level by level, so that the children of a node have consecutive
numbers. The last node is a dummy without children, which fills up lists of nodes.

Shapes: K lists of answers, B rows, M nodes, C answers of a list, D tokens of the longest answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

Ids = Sequence[int]


@dataclass(frozen=True)
class AnswerTrees:
    """The trees of several lists of answers, or of several rows' answers."""

    tokens: Tensor
    """Token of each node, [B, M]."""
    parents: Tensor
    depths: Tensor
    """Number of tokens from the root to the node, [B, M]."""
    first: Tensor
    """First child of each node, [B, M]."""
    counts: Tensor
    """Number of children of each node, [B, M]; nodes without children need not be run."""
    paths: Tensor
    """Nodes from below the root to the node, [B, M, D]; shorter paths end in zeros."""
    chains: Tensor
    """The node that is reached from each node by following first inner children, [B, M]."""
    order: Tensor
    """Place of each inner node below the root in a walk through the tree, [B, M]; -1 elsewhere.

    Places near each other share beginnings."""
    chain_order: Tensor
    """The same for the nodes where chains begin, whose chains cover all inner nodes, [B, M]."""
    ends: Tensor
    """The node at which each answer ends, [B, C]; -1 where a row has fewer answers."""

    @classmethod
    def of(cls, lists: Sequence[Sequence[Ids]], device: torch.device) -> AnswerTrees:
        """Build the trees of K lists of answers."""
        trees = [_Tree.of(answers) for answers in lists]
        nodes = 1 + max(len(tree.tokens) for tree in trees)
        deepest = max(1, *(max(tree.depths) for tree in trees))
        most = max(len(tree.ends) for tree in trees)

        def padded(name: str, fill: int, width: int) -> Tensor:
            columns = [getattr(tree, name) for tree in trees]
            return torch.tensor(
                [[*column, *[fill] * (width - len(column))] for column in columns], device=device
            )

        paths = torch.zeros(len(trees), nodes, deepest, dtype=torch.long)
        for tree_index, tree in enumerate(trees):
            for node, path in enumerate(tree.paths):
                paths[tree_index, node, : len(path)] = torch.tensor(path, dtype=torch.long)
        return cls(
            tokens=padded("tokens", 0, nodes),
            parents=padded("parents", 0, nodes),
            depths=padded("depths", 1, nodes),
            first=padded("first", 0, nodes),
            counts=padded("counts", 0, nodes),
            paths=paths.to(device),
            chains=padded("chains", 0, nodes),
            order=padded("order", -1, nodes),
            chain_order=padded("chain_order", -1, nodes),
            ends=padded("ends", -1, most),
        )

    @classmethod
    def of_rows(cls, answers: Sequence[Sequence[Ids]], device: torch.device) -> AnswerTrees:
        """Build the tree of each row's answers; equal lists share their tree's construction."""
        keys = {id(choices): tuple(map(tuple, choices)) for choices in answers}
        places = {key: place for place, key in enumerate(dict.fromkeys(keys.values()))}
        rows = [places[keys[id(choices)]] for choices in answers]
        return cls.of(list(places), device).select(torch.tensor(rows, device=device))

    @property
    def dummy(self) -> int:
        """The node that stands for no node."""
        return self.tokens.shape[1] - 1

    def select(self, rows: Tensor) -> AnswerTrees:
        """Return the trees at the given places [B], in that order."""
        picked = {field.name: getattr(self, field.name)[rows] for field in fields(self)}
        return replace(self, **picked)


@dataclass(frozen=True)
class _Tree:
    """One tree, as lists with an entry for each node."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    first: list[int]
    counts: list[int]
    paths: list[list[int]]
    chains: list[int]
    order: list[int]
    chain_order: list[int]
    ends: list[int]

    @classmethod
    def of(cls, answers: Sequence[Ids]) -> _Tree:
        children, ends = _children_by_level(answers)
        parents, tokens = [0] * len(children), [0] * len(children)
        for node, below in enumerate(children):
            for token, child in below.items():
                parents[child], tokens[child] = node, token
        paths: list[list[int]] = [[]]
        for node in range(1, len(children)):
            paths.append([*paths[parents[node]], node])
        inner = [[child for child in below.values() if children[child]] for below in children]
        chains = list(range(len(children)))
        for node in reversed(chains.copy()):
            chains[node] = chains[inner[node][0]] if inner[node] else node
        walk = list(_walk(inner))
        heads = [node for node in walk if parents[node] == 0 or inner[parents[node]][0] != node]
        return cls(
            tokens=tokens,
            parents=parents,
            depths=[len(path) for path in paths],
            first=[min(below.values(), default=0) for below in children],
            counts=[len(below) for below in children],
            paths=paths,
            chains=chains,
            order=_places(walk, len(children)),
            chain_order=_places(heads, len(children)),
            ends=ends,
        )


def _children_by_level(answers: Sequence[Ids]) -> tuple[list[dict[int, int]], list[int]]:
    """Return each node's children by token, numbered level by level, and each answer's end."""
    children: list[dict[int, int]] = [{}]
    ends = []
    for ids in answers:
        node = 0
        for token in ids:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
            node = children[node][token]
        ends.append(node)
    levels = [0]
    for node in levels:  # grows while it is read
        levels.extend(children[node].values())
    number = {node: place for place, node in enumerate(levels)}
    numbered = [
        {token: number[child] for token, child in children[node].items()} for node in levels
    ]
    return numbered, [number[node] for node in ends]


def _walk(inner: Sequence[Sequence[int]]) -> Iterator[int]:
    """Walk through the inner nodes below the root, each before its children."""
    waiting = list(reversed(inner[0]))
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(inner[node]))


def _places(nodes: Sequence[int], count: int) -> list[int]:
    places = [-1] * count
    for place, node in enumerate(nodes):
        places[node] = place
    return places
