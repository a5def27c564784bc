"""How many floating-point operations a step needs, counted by hand.

A multiplication with a frozen matrix costs 2 operations a parameter and token forward and 2 backward, to its input.
Norms, activations, embeddings and the loss are left out: they are no matrix products.

Shapes: P virtual tokens, T input tokens, Y target tokens, B rows, K prompts, H width of all heads together.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

FORWARD_AND_BACKWARD = 4


@dataclass(frozen=True)
class Weights:
    """Parameters of the matrices that tokens of the body pass, those of the head, and attention's size. ``end``: those
    of the last block that only tokens whose logits are read have to pass, which are all but keys' and values'."""

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
        """Of a step that sends so many tokens through body and head, with so many pairs of query and key in a layer;
        in the last block some tokens and pairs may be spared."""
        tokens = self.body * body_tokens - self.end * spared_tokens + self.head * head_tokens
        return FORWARD_AND_BACKWARD * tokens + self._attention(self.layers * pairs - spared_pairs)

    def _attention(self, pairs: float) -> float:
        # Scores and their sum of values: 2 products of 2 H forward, and the 4 products of their gradients.
        return 12 * self.width * pairs


def causal_pairs(queries: int, before: int = 0) -> int:
    """Pairs of query and key: each of the last ``queries`` tokens sees the ``before`` ones, the earlier and itself."""
    return queries * before + queries * (queries + 1) // 2


def repeated(
    weights: Weights, prompt: int, inputs: int, target: int, rows: int, *, prefix: bool = False
) -> float:
    """PEFT: every row carries its prompt, the last target token is fed too, and every position has logits.

    ``prefix``: the virtual tokens are keys and values, no tokens of the body.
    """
    tokens = inputs + target
    if prefix:
        return weights.operations(rows * tokens, rows * tokens, rows * causal_pairs(tokens, prompt))
    whole = prompt + tokens
    return weights.operations(rows * whole, rows * whole, rows * causal_pairs(whole))


def once(
    weights: Weights, prompt: int, inputs: int, target: int, rows: int, *, prefix: bool = False
) -> float:
    """Ours: the prompt runs once, the last target token is not fed, and the target alone has queries in the last block
    and logits."""
    tokens = inputs + target - 1
    own = 0 if prefix else prompt
    pairs = rows * causal_pairs(tokens, prompt) + causal_pairs(own)
    read = rows * causal_pairs(target, prompt + tokens - target)
    return weights.operations(
        own + rows * tokens, rows * target, pairs, own + rows * (tokens - target), pairs - read
    )
