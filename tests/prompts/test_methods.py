"""Each method against its definition in the papers."""

from __future__ import annotations

import pytest
import torch
from models import tiny_backbone

from orchestrator.job.space import TrialSpec
from orchestrator.tuning.prompts import InitContext, Method, make_prompt
from orchestrator.tuning.prompts.inits import initial_prefix, initial_prompt
from orchestrator.tuning.prompts.p_tuning import EncodedPrompt, LstmEncoder
from orchestrator.tuning.prompts.prefix import MlpSite, Prefix

CONTEXT = InitContext.of(tiny_backbone(), [[5], [6, 7]])
RANDOM = TrialSpec("random", None, 4, 0.1, 0)
TEXT = TrialSpec("text", "is this message spam", 6, 0.1, 0)
STARTS = [
    TEXT,
    TrialSpec("class_labels", None, 5, 0.1, 1),
    TrialSpec("sample_vocab", None, 3, 0.1, 2),
]


@pytest.mark.parametrize("reparameterization", ["mlp", "lstm"])
@pytest.mark.parametrize("spec", STARTS, ids=lambda spec: spec.init)
def test_p_tuning_starts_at_its_init(reparameterization: str, spec: TrialSpec) -> None:
    """Before the first step the network's output is exactly the init.

    The output's gradient reaches the network.
    """
    prompt = make_prompt(Method("p_tuning", reparameterization), spec, CONTEXT)  # type: ignore[arg-type]
    embeddings = prompt().embeddings
    assert embeddings is not None and torch.equal(embeddings, initial_prompt(spec, CONTEXT))
    embeddings.square().sum().backward()
    assert prompt.get_parameter("encoder.network.last.weight").grad.abs().sum() > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("reparameterization", ["mlp", "none"])
@pytest.mark.parametrize("spec", STARTS, ids=lambda spec: spec.init)
def test_a_prefix_starts_at_its_init(reparameterization: str, spec: TrialSpec) -> None:
    """A prefix starts with the keys and values of the init, with and without the network."""
    prefix = make_prompt(Method("prefix_tuning", reparameterization), spec, CONTEXT)()  # type: ignore[arg-type]
    for site, tensor in initial_prefix(spec, CONTEXT).items():
        torch.testing.assert_close(prefix.prefixes[site], tensor, rtol=0, atol=1e-6)


def test_p_tuning_is_the_papers_network() -> None:
    """The network is the paper's (Liu et al., section 3.2), written out here again.

    It has two bidirectional LSTM layers, of half the width in each direction, then
    Linear-ReLU-Linear.
    """
    prompt = make_prompt(Method("p_tuning", "lstm"), RANDOM, CONTEXT)
    assert isinstance(prompt, EncodedPrompt)
    network = prompt.encoder.network
    assert isinstance(network, LstmEncoder) and network.lstm.hidden_size == 16
    states = prompt.tokens
    for layer in range(2):
        outputs = []
        for end in ("", "_reverse"):
            names = (
                f"weight_ih_l{layer}{end}",
                f"weight_hh_l{layer}{end}",
                f"bias_ih_l{layer}{end}",
                f"bias_hh_l{layer}{end}",
            )
            taken, kept, bias_in, bias_hidden = (getattr(network.lstm, name) for name in names)
            hidden, cell, made = torch.zeros(16), torch.zeros(16), []
            for token in states if not end else states.flip(0):
                gates = taken @ token + bias_in + kept @ hidden + bias_hidden
                enter, forget, new, leave = gates.chunk(4)
                cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
                hidden = leave.sigmoid() * cell.tanh()
                made.append(hidden)
            outputs.append(torch.stack(made if not end else made[::-1]))
        states = torch.cat(outputs, dim=1)
    wanted = network.last(torch.relu(network.first(states)))
    torch.testing.assert_close(prompt().embeddings, wanted, rtol=1e-5, atol=1e-6)


def test_prefix_reparameterisation_is_the_papers_network() -> None:
    """P = MLP(P'), Linear-Tanh-Linear with 512 hidden units (Li & Liang, section 4.3).

    The output is ordered by layer, then keys before values, then by head.
    """
    prompt = make_prompt(Method("prefix_tuning", "mlp"), RANDOM, CONTEXT)
    assert isinstance(prompt, Prefix)
    site = prompt.sites["decoder"]
    assert isinstance(site, MlpSite)
    first, _, last = site.mlp.network  # type: ignore[misc]
    assert first.out_features == 512
    flat = last(torch.tanh(first(site.tokens)))
    keys_values = prompt().prefixes["decoder"]
    assert keys_values.shape == (2, 2, 2, 4, 8) and flat.shape == (4, 2 * 2 * 2 * 8)
    assert torch.equal(keys_values[1, 0, 1], flat[:, 32 + 8 : 32 + 16])  # layer 1, keys, head 1


def test_a_direct_prefix_starts_uniform() -> None:
    """Without a network and an init, a prefix is uniform in [-0.5, 0.5]."""
    long = TrialSpec("random", None, 60, 0.1, 0)
    drawn = make_prompt(Method("prefix_tuning"), long, CONTEXT)().prefixes["decoder"]
    assert float(drawn.abs().max()) <= 0.5 and float(drawn.std()) == pytest.approx(
        12**-0.5, rel=0.05
    )


@pytest.mark.parametrize(
    "method", [Method(), Method("prefix_tuning", "mlp", 3), Method("p_tuning", "lstm")]
)
def test_the_seed_decides(method: Method) -> None:
    """The start depends on the seed alone, not on earlier random draws."""

    def start(seed: int) -> list[torch.Tensor]:
        torch.rand(3)
        spec = TrialSpec("random", None, 4, 0.1, seed)
        return list(make_prompt(method, spec, CONTEXT)().named().values())

    assert all(torch.equal(one, other) for one, other in zip(start(1), start(1), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(start(1), start(2), strict=True))


def test_a_network_is_no_part_of_the_artifact() -> None:
    """The artifact has the P x H numbers, or the keys and values, without the larger network."""
    for method in (Method("p_tuning", "lstm"), Method("prefix_tuning", "mlp")):
        prompt = make_prompt(method, RANDOM, CONTEXT)
        kept = sum(tensor.numel() for tensor in prompt().named().values())
        assert kept == (4 * 32 if method.name == "p_tuning" else 2 * 2 * 2 * 4 * 8)
        assert sum(part.numel() for part in prompt.parameters()) > 10 * kept
