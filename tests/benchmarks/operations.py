"""Floating-point operations of a training step, counted by hand.

A product with a frozen matrix costs 2 operations a parameter and token forward, and 2 backward for
the gradient of its input. Norms, activations, embeddings and the loss are left out, since they are
not matrix products.

Shapes: P virtual tokens, T input tokens, Y target tokens, B rows, K prompts, H width of all heads
together.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

FORWARD_AND_BACKWARD = 4


@dataclass(frozen=True)
class Weights:
    """Parameter counts of the body's and the head's matrices, and the size of attention.

    ``end``: parameters of the last block that only tokens with logits have to pass, which are all
    of its matrices but those of keys and values.
    """

    body: int
    head: int
    layers: int
    width: int
    end: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> Weights:
        head = model.get_output_embeddings()  # type: ignore[operator]
        matrices = {
            name: module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module is not head
        }
        config = model.config
        last = f".{config.num_hidden_layers - 1}."
        end = sum(
            count
            for name, count in matrices.items()
            if last in name and not name.endswith(("k_proj", "v_proj"))
        )
        width = config.num_attention_heads * config.head_dim
        return cls(
            sum(matrices.values()), head.weight.numel(), config.num_hidden_layers, width, end
        )

    def operations(
        self,
        body_tokens: float,
        head_tokens: float,
        pairs: float,
        spared_tokens: float = 0,
        spared_pairs: float = 0,
    ) -> float:
        """Return the operations of a step.

        ``body_tokens`` pass the body and ``head_tokens`` the head; ``pairs`` are pairs of query and
        key in one layer. ``spared_tokens`` and ``spared_pairs`` are left out in the last block.
        """
        tokens = self.body * body_tokens - self.end * spared_tokens + self.head * head_tokens
        return FORWARD_AND_BACKWARD * tokens + self._attention(self.layers * pairs - spared_pairs)

    def _attention(self, pairs: float) -> float:
        # Forward: 2 products (scores, weighted sum of values) of 2 H operations a pair.
        # Backward: 4 products for their gradients.
        return 12 * self.width * pairs


def causal_pairs(queries: int, before: int = 0) -> int:
    """Return the number of pairs of query and key.

    Each of the last ``queries`` tokens sees the ``before`` tokens, the queries before it and
    itself.
    """
    return queries * before + queries * (queries + 1) // 2


def repeated(
    weights: Weights, prompt: int, inputs: int, target: int, rows: int, *, prefix: bool = False
) -> float:
    """Return the operations of PEFT's step.

    Every row carries its prompt, the last target token is an input too, and every position has
    logits.

    ``prefix``: the virtual tokens are keys and values, and do not pass the body.
    """
    tokens = inputs + target
    if prefix:
        return weights.operations(rows * tokens, rows * tokens, rows * causal_pairs(tokens, prompt))
    whole = prompt + tokens
    return weights.operations(rows * whole, rows * whole, rows * causal_pairs(whole))


def once(
    weights: Weights, prompt: int, inputs: int, target: int, rows: int, *, prefix: bool = False
) -> float:
    """Return the operations of our step.

    The prompt runs once and the last target token is no input. In the last block only the target
    has queries, and only the target has logits.
    """
    tokens = inputs + target - 1
    own = 0 if prefix else prompt
    pairs = rows * causal_pairs(tokens, prompt) + causal_pairs(own)
    read = rows * causal_pairs(target, prompt + tokens - target)
    return weights.operations(
        own + rows * tokens, rows * target, pairs, own + rows * (tokens - target), pairs - read
    )
