"""Inits against their definitions in Lester et al. (2021)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import get_args

import pytest
import torch
from models import encoder_for, spaced_tokenizer, tiny_backbone, tiny_tokenizer
from torch import Tensor

from orchestrator.errors import BadInput
from orchestrator.job.space import INIT_FIELDS, TrialSpec
from orchestrator.job.spec import Init, NamedInit
from orchestrator.tuning.prompts.inits import (
    INITS,
    InitContext,
    frequent_ids,
    initial_prefix,
    initial_prompt,
)

ANSWERS = encoder_for("several tokens").answers
CONTEXT = InitContext.of(tiny_backbone(), ANSWERS)
TABLE = tiny_backbone().table.detach().float()


def made(
    init: str, length: int, seed: int = 0, text: str | None = None, context: InitContext = CONTEXT
) -> Tensor:
    return initial_prompt(TrialSpec(init, text, length, 0.3, seed), context)


def ids_of(prompt: Tensor, table: Tensor = TABLE) -> list[int]:
    """Return the token of each virtual token's embedding; -1 where there is none."""
    same = (prompt[:, None] == table[None]).all(-1)
    return [int(row.nonzero()[0]) if row.any() else -1 for row in same]


def test_every_init_of_the_job_spec_is_made() -> None:
    """Each named init, and each init with a value, has an entry in INITS, and there is no other."""
    sections = [kind for kind in get_args(Init) if hasattr(kind, "model_fields")]
    with_value = {key for section in sections for key in section.model_fields}
    assert with_value == set(INIT_FIELDS)
    assert set(INITS) == {*get_args(NamedInit), *with_value}


@pytest.mark.parametrize("init", get_args(NamedInit))
@pytest.mark.parametrize("length", [1, 2, 3, 50, 400])
def test_seeds_reproduce(init: str, length: int) -> None:
    """A seed determines the [P, H] in float32; the global random state plays no part."""
    torch.manual_seed(1)
    first = made(init, length, seed=7)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert torch.equal(made(init, length, seed=7), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.shape == (length, TABLE.shape[1]) and first.dtype == torch.float32


@pytest.mark.parametrize("init", ["random", "random_normal", "sample_vocab", "class_labels"])
def test_another_seed_gives_another_prompt(init: str) -> None:
    """Inits that draw at random differ from seed to seed."""
    assert not torch.equal(made(init, 5, seed=8), made(init, 5, seed=7))


def test_random_is_uniform() -> None:
    """Values fill [-0.5, 0.5] and have the mean and variance of a uniform distribution."""
    values = made("random", 2000)
    assert values.min() >= -0.5 and values.max() <= 0.5
    assert values.min() < -0.499 and values.max() > 0.499
    assert float(values.mean()) == pytest.approx(0, abs=0.005)
    assert float(values.var()) == pytest.approx(1 / 12, rel=0.02)


def test_sample_vocab_draws_without_replacement() -> None:
    """Virtual tokens are embeddings of frequent tokens, without repeats while any are left."""
    population = frequent_ids(CONTEXT)
    drawn = ids_of(made("sample_vocab", 100))
    assert len(set(drawn)) == 100 and set(drawn) <= set(population)
    assert drawn != sorted(drawn)


def test_a_prompt_longer_than_the_vocabulary_starts_again() -> None:
    """When virtual tokens outnumber the tokens, each is used once before any is used twice."""
    population = frequent_ids(CONTEXT)
    drawn = ids_of(made("sample_vocab", 2 * len(population) + 5))
    assert sorted(drawn[: len(population)]) == sorted(population)
    assert sorted(drawn[len(population) : 2 * len(population)]) == sorted(population)
    assert len(set(drawn[-5:])) == 5


def test_frequent_tokens_are_ordinary_ones() -> None:
    """Special tokens and byte fallbacks are not drawn; the lowest ids come first."""
    tokenizer = spaced_tokenizer()
    context = InitContext(CONTEXT.embed, (len(tokenizer), 32), tokenizer, [])
    population = frequent_ids(context)
    names = tokenizer.convert_ids_to_tokens(population)
    assert population == sorted(population) and len(population) == len(tokenizer) - 3 - 256
    assert not {"<s>", "<end>", "<unk>"} & set(names) and not any(
        re.fullmatch("<0x..>", name) for name in names
    )
    assert frequent_ids(context, 10) == population[:10]
    assert not set(tiny_tokenizer().all_special_ids) & set(frequent_ids(CONTEXT))


def test_tokens_without_an_embedding_are_never_drawn() -> None:
    """Only ids within both the tokenizer and the embedding table are drawn.

    A tokenizer may have more tokens than the table has rows; a padded table may have more rows.
    """
    assert max(frequent_ids(replace(CONTEXT, shape=(300, 32)))) == 299
    assert max(frequent_ids(replace(CONTEXT, shape=(5000, 32)))) == len(tiny_tokenizer()) - 1


def test_class_labels_are_means_over_their_tokens() -> None:
    """Each label gives one virtual token, the mean of its tokens' embeddings.

    The rest are drawn from the vocabulary.
    """
    prompt = made("class_labels", 10, seed=3)
    for place, ids in enumerate(ANSWERS):
        assert len(ids) > 1
        torch.testing.assert_close(
            prompt[place], torch.stack([TABLE[token] for token in ids]).mean(0)
        )
    assert torch.equal(prompt[2:], made("sample_vocab", 8, seed=3))
    assert -1 not in ids_of(prompt[2:])


def test_fewer_virtual_tokens_than_labels() -> None:
    """With fewer virtual tokens than labels, the first labels are used."""
    assert torch.equal(made("class_labels", 1), made("class_labels", 10)[:1])
    assert torch.equal(made("class_labels", 2, seed=1), made("class_labels", 2, seed=2))


@pytest.mark.parametrize("length", [1, 3, 5, 12])
@pytest.mark.parametrize("spaced", [False, True])
def test_text_is_cut_or_repeated(length: int, spaced: bool) -> None:
    """Virtual tokens are the text's tokens in order, cut or repeated to the length.

    Special tokens in front are left out.
    """
    tokenizer = spaced_tokenizer() if spaced else tiny_tokenizer()
    table = torch.randn(len(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    context = InitContext(lambda ids: table[ids], (len(table), 8), tokenizer, [])
    text = "the quick brown fox"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert (tokenizer(text)["input_ids"] != tokens) is spaced
    got = ids_of(made("text", length, text=text, context=context), table)
    assert got == (tokens * length)[:length]
    assert torch.equal(made("text", length, seed=1, text=text, context=context), table[got])


def test_a_text_without_tokens_is_refused() -> None:
    """A text without tokens is BadInput."""
    with pytest.raises(BadInput, match="init text '' has no tokens"):
        made("text", 3, text="")


def test_an_unknown_init_is_refused() -> None:
    """The message names the unknown init and the known ones."""
    with pytest.raises(BadInput, match=rf"init 'no such init' is unknown\n.*{', '.join(INITS)}"):
        made("no such init", 3)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2", "llama", "opt"])
def test_virtual_tokens_are_what_enters_the_model(family: str) -> None:
    """A text init gives exactly the logits of the text's token ids.

    This includes families that scale their embeddings.
    """
    backbone = tiny_backbone(family, torch.float32)
    context = InitContext.of(backbone, [])
    words = "the quick brown fox"
    ids = tiny_tokenizer()(words)["input_ids"]
    prompt = made("text", len(ids), text=words, context=context)
    with torch.no_grad():
        by_ids = backbone.model(input_ids=torch.tensor([ids])).logits
        by_prompt = backbone.model(inputs_embeds=prompt[None]).logits
    torch.testing.assert_close(by_prompt, by_ids)


def test_the_prompt_is_its_own_memory() -> None:
    """Writing to a prompt never changes the embedding table."""
    before = TABLE.clone()
    backbone = tiny_backbone(dtype=torch.float32)
    context = InitContext.of(backbone, ANSWERS)
    table = backbone.table.clone()
    for init, text in [("sample_vocab", None), ("class_labels", None), ("text", "the")]:
        prompt = made(init, 4, text=text, context=context)
        assert not prompt.requires_grad
        prompt.fill_(9.0)
    assert torch.equal(backbone.table, table) and torch.equal(TABLE, before)


def test_random_normal_is_as_wide_as_the_vocabulary() -> None:
    """random_normal has mean zero and the standard deviation of the embedding table."""
    prompt = made("random_normal", 400, seed=1)
    spread = float(tiny_backbone().table.float().std())
    assert (
        float(prompt.std()) == pytest.approx(spread, rel=0.05)
        and abs(float(prompt.mean())) < 0.05 * spread
    )
    assert torch.equal(prompt, made("random_normal", 400, seed=1)) and not torch.equal(
        prompt, made("random_normal", 400, seed=2)
    )


def test_the_population_of_sampled_tokens_is_an_option() -> None:
    """sample_vocab: N draws from the N most frequent tokens, each once before any twice."""
    spec = TrialSpec("sample_vocab", None, 8, 0.3, 0, init_population=4)
    rows = {tuple(row.tolist()) for row in initial_prompt(spec, CONTEXT)}
    allowed = CONTEXT.embed(torch.tensor(frequent_ids(CONTEXT, 4))).float()
    assert rows == {tuple(row.tolist()) for row in allowed}


STORED = torch.arange(3.0 * 32).view(3, 32)


@pytest.mark.parametrize(
    ("length", "places"), [(3, [0, 1, 2]), (2, [0, 1]), (7, [0, 1, 2, 0, 1, 2, 0])]
)
def test_another_prompt_is_cut_or_repeated(length: int, places: list[int]) -> None:
    """An artifact's virtual tokens are taken in order, cut or repeated to the trial's length."""
    context = replace(CONTEXT, artifacts={"other@champion": {"prompt": STORED}})
    spec = TrialSpec("artifact", None, length, 0.3, 0, init_artifact="other@champion")
    assert torch.equal(initial_prompt(spec, context), STORED[places])


def test_what_can_not_start_a_soft_prompt() -> None:
    """A prefix, and a prompt of another width, can't start a soft prompt; the message says why."""
    prefix = {"prefix.decoder": torch.zeros(2, 2, 2, 3, 8)}
    context = replace(CONTEXT, artifacts={"p": prefix, "wide": {"prompt": torch.zeros(3, 64)}})
    for name, message in (
        ("p", "'p' is a prefix"),
        ("wide", "'wide' has width 64, the base model's is 32"),
    ):
        with pytest.raises(BadInput, match=message):
            initial_prompt(TrialSpec("artifact", None, 3, 0.3, 0, init_artifact=name), context)


def test_a_prefix_starts_from_a_prefix_or_from_keys_and_values() -> None:
    """A registered prefix is taken as it is, cut to the length.

    Any other start has the keys and values of the same soft prompt in the model.
    """
    prefix = torch.randn(2, 2, 2, 3, 8)
    context = replace(
        CONTEXT, artifacts={"p": {"prefix.decoder": prefix}, "s": {"prompt": STORED / 100}}
    )
    taken = initial_prefix(TrialSpec("artifact", None, 2, 0.3, 0, init_artifact="p"), context)
    assert torch.equal(taken["decoder"], prefix[:, :, :, :2])
    for spec in (
        TrialSpec("artifact", None, 5, 0.3, 0, init_artifact="s"),
        TrialSpec("class_labels", None, 5, 0.3, 0),
        TrialSpec("text", "is this spam", 5, 0.3, 0),
    ):
        wanted = tiny_backbone().activations(initial_prompt(spec, context))["decoder"]
        assert torch.equal(initial_prefix(spec, context)["decoder"], wanted.float())
