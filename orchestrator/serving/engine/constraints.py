"""Constraints on generated texts: the tokens that may come next in a row.

A ``Constraint`` belongs to a request and is shared by its rows. Each row follows it with a
``Guide`` of its own. Rows without a constraint know nothing of this module.

Shapes: V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from orchestrator.errors import BadInput


class ConstraintFailed(BadInput):
    """A row can't go on under its constraint; other rows are not affected."""


class Guide(Protocol):
    """The position of one row in its constraint."""

    def allowed(self, size: int) -> Tensor:
        """Return which of the tokens may come next, as bool [V] on the CPU; ``size`` is V.

        The end token is among them where the text may end. Raises ConstraintFailed.
        """

    def take(self, token: int) -> bool:
        """Move past a token that is not the end token; return whether nothing may follow it.

        Raises ConstraintFailed.
        """


class Constraint(Protocol):
    """A constraint on the texts of a request."""

    def start(self) -> Guide:
        """Return the guide of a new row."""


@dataclass
class _Node:
    """A point in the tree of the answers' tokens."""

    children: dict[int, _Node] = field(default_factory=dict)
    is_end: bool = False


class AnswerConstraint:
    """A constraint to some answers, token by token as the prompt was tuned to give them."""

    def __init__(self, answers: Sequence[Sequence[int]], end_id: int) -> None:
        """Build the tree of the answers' tokens, which do not include the end token."""
        self.end_id = end_id
        self._root = _Node()
        for answer in answers:
            node = self._root
            for token in answer:
                node = node.children.setdefault(token, _Node())
            node.is_end = True

    def start(self) -> AnswerGuide:
        return AnswerGuide(self._root, self.end_id)


class AnswerGuide:
    """A row's position in the tree of the answers' tokens."""

    def __init__(self, node: _Node, end_id: int) -> None:
        self._node = node
        self._end_id = end_id

    def allowed(self, size: int) -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool)
        mask[list(self._node.children)] = True
        if self._node.is_end:
            mask[self._end_id] = True
        return mask

    def take(self, token: int) -> bool:
        self._node = self._node.children[token]
        return not self._node.children


class GrammarConstraint:
    """A constraint to a compiled grammar (``grammars.Grammars``)."""

    def __init__(self, matcher: Any) -> None:
        """Set the matcher, an ``llguidance.LLMatcher`` at the beginning of a text."""
        self._matcher = matcher

    def start(self) -> GrammarGuide:
        return GrammarGuide(self._matcher.deep_copy())


class GrammarGuide:
    """A row's position in a grammar."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def allowed(self, size: int) -> Tensor:
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = torch.zeros(size, dtype=torch.bool)
        allowed_tokens = np.unpackbits(bits, bitorder="little")[:size].view(np.bool_)
        mask[: len(allowed_tokens)] = torch.from_numpy(allowed_tokens)
        return mask

    def take(self, token: int) -> bool:
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        """Raise ConstraintFailed if the matcher gave up or can't reach the end of any text."""
        matcher = self._matcher
        if not matcher.is_error() and (not matcher.is_stopped() or matcher.is_accepting()):
            return
        if re.search("too many|too big|limit", matcher.get_error().lower()):
            raise ConstraintFailed(
                "the requested structure is too complex to be followed token by token",
                "simplify the schema, regular expression or grammar",
            )
        raise ConstraintFailed(
            "no token of the base model continues the text in the requested structure",
            "use only characters that the base model's tokenizer can write",
        )
