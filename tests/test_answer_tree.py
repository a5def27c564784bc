"""Answers ranked as a tree of their tokens: the scores and the choice of answer by answer."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import (
    MASKED,
    SEQ2SEQ,
    backbone_of,
    encoder_for,
    random_ids,
    random_prompts,
    tiny_backbone,
)
from torch import Tensor

from orchestrator.data.encoding import Encoded
from orchestrator.models import ranking
from orchestrator.models.answer_tree import AnswerTrees
from orchestrator.models.backbone import Backbone, PromptTensors
from orchestrator.models.backbone.causal import PROMPT_ONCE_FAMILIES
from orchestrator.models.ranking import rank
from orchestrator.models.scoring import answer_scores
from orchestrator.tuning.evaluate import evaluate

Answers = Sequence[Sequence[int]]
INPUTS = random_ids([6, 1, 11, 3, 8])
CPU = torch.device("cpu")
# Answers that begin others, that share beginnings of several lengths, and that stand alone.
NESTED = [
    *([5], [5, 6], [5, 6, 7, 8], [9, 9], [9, 10, 11], [9, 10, 12], [4], [13, 5, 6], [13, 5, 7]),
    *([20], [30], [40, 41], [50], [60], [70, 71], [80], [90], [100], [110], [120], [130], [140]),
]
FAMILIES_WITH_TREES = [*sorted(PROMPT_ONCE_FAMILIES), "mistral", "gemma3_text", *SEQ2SEQ]
# How a family's continuations are run, with one of each way.
WAYS = {"llama": "_Branches", "t5": "_Copies", "mistral": "_WholeRows"}


def prompts_of(backbone: Backbone, kind: str) -> list[PromptTensors] | None:
    """Return three prompts of a kind; soft prompts and prefixes have different lengths."""
    if kind == "none":
        return None
    lengths = [4, 1, 9]
    if kind == "soft":
        return [PromptTensors(prompt.detach()) for prompt in random_prompts(backbone, lengths)]
    generator = torch.Generator().manual_seed(3)

    def prefix(length: int) -> dict[str, Tensor]:
        return {
            site: torch.randn(*shape[:3], length, shape[4], generator=generator).to(backbone.table)
            for site, shape in backbone.prefix_shapes.items()
        }

    return [PromptTensors(prefixes=prefix(length)) for length in lengths]


def one_by_one(
    backbone: Backbone,
    prompts: list[PromptTensors] | None,
    inputs: Answers,
    owner: Sequence[int],
    answers: Answers,
) -> list[Tensor]:
    """Score the answers of each row with the row's own prompt, without cache and padding.

    Answers of one length share a forward, in which every answer has the whole input to itself.
    """
    scores = []
    for ids, place in zip(inputs, owner, strict=True):
        prepared = None if prompts is None else backbone.prepare([prompts[place]])
        log_probs = torch.zeros(len(answers))
        for length in {len(answer) for answer in answers}:
            alike = [index for index, answer in enumerate(answers) if len(answer) == length]
            logits, targets = backbone.teacher_forced(
                prepared, [ids] * len(alike), [answers[index] for index in alike], [0] * len(alike)
            )
            picked = logits.float().log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0]
            log_probs[alike] = picked.sum(1).cpu()
        scores.append(log_probs)
    return scores


def in_trees(backbone: Backbone, answers: Answers, rows: int) -> AnswerTrees:
    return AnswerTrees.of_rows([answers] * rows, backbone.device)


@pytest.mark.parametrize("kind", ["none", "soft", "prefix"])
@pytest.mark.parametrize("family", FAMILIES_WITH_TREES)
def test_a_tree_scores_as_answer_by_answer(family: str, kind: str) -> None:
    """Scores and choice are those of each answer after its own whole input, in every family.

    Rows have different lengths, and prompts of different lengths or none share the forwards.
    """
    backbone = backbone_of(family)
    owner = [1, 0, 1, 2, 0] if kind != "none" else [0] * len(INPUTS)
    prompts = prompts_of(backbone, kind)
    trees = in_trees(backbone, NESTED, len(INPUTS))
    with torch.no_grad():
        wanted = torch.stack(one_by_one(backbone, prompts, INPUTS, owner, NESTED))
        prepared = None if prompts is None else backbone.prepare(prompts)
        every = rank(backbone, prepared, INPUTS, owner, trees)
        best = rank(backbone, prepared, INPUTS, owner, trees, every=False)
    torch.testing.assert_close(every.scores.cpu(), wanted, rtol=1e-5, atol=1e-5)
    likeliest = wanted.argmax(1).tolist()
    assert every.given.tolist() == best.given.tolist() == likeliest
    assert len(set(likeliest)) > 1


@pytest.mark.parametrize(("family", "way"), WAYS.items())
def test_float32_agrees_with_float64(family: str, way: str) -> None:
    """In float32 the scores are those of float64 within a small tolerance."""
    scores = []
    for dtype in (torch.float32, torch.float64):
        backbone = backbone_of(family, dtype)
        prompts = prompts_of(backbone, "soft")
        trees = in_trees(backbone, NESTED, len(INPUTS))
        with torch.no_grad():
            prepared = None if prompts is None else backbone.prepare(prompts)
            scores.append(rank(backbone, prepared, INPUTS, [1, 0, 1, 2, 0], trees).scores)
    torch.testing.assert_close(*scores, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("family", "way"), WAYS.items())
def test_each_family_runs_continuations_in_its_own_way(family: str, way: str) -> None:
    """One family of each way to run continuations is in these tests."""
    runs = ranking._runs_of(backbone_of(family), None, INPUTS, [0] * len(INPUTS))
    assert type(runs).__name__ == way


def words(tokens: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(2, 1 + tokens), min_size=1, max_size=5)


# Few different tokens give equal first tokens, and answers that begin others.
TRIES = st.integers(1, 4).flatmap(
    lambda tokens: st.lists(words(tokens), min_size=1, max_size=12, unique_by=tuple)
)


@pytest.mark.parametrize("family", WAYS)
@settings(max_examples=15, deadline=None)
@given(answers=TRIES, piece=st.integers(1, 9), kept=st.integers(1, 9), first=st.integers(1, 4))
def test_any_tree_is_ranked_exactly(
    family: str, answers: list[list[int]], piece: int, kept: int, first: int
) -> None:
    """Any answers are ranked as one by one, whatever the sizes of pieces and of the kept cache."""
    backbone = backbone_of(family)
    inputs, owner = INPUTS[:3], [1, 0, 2]
    prompts = prompts_of(backbone, "soft")
    trees = in_trees(backbone, answers, len(inputs))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ranking, "FORWARD_TOKENS", piece * len(inputs))
        patch.setattr(ranking, "KEPT_COLUMNS", kept)
        patch.setattr(ranking, "BEST_FIRST", first)
        wanted = torch.stack(one_by_one(backbone, prompts, inputs, owner, answers))
        prepared = backbone.prepare(prompts or [])
        every = rank(backbone, prepared, inputs, owner, trees)
        best = rank(backbone, prepared, inputs, owner, trees, every=False)
    torch.testing.assert_close(every.scores.cpu(), wanted, rtol=1e-5, atol=1e-5)
    for row, given_index in enumerate(best.given.tolist()):
        # Answers whose scores differ by rounding only may change places.
        assert wanted[row, given_index] >= wanted[row].max() - 1e-5
        assert best.scores[row, given_index] == best.scores[row].max()


@given(TRIES)
def test_a_tree_has_each_beginning_once(answers: list[list[int]]) -> None:
    """Nodes are the different beginnings, their paths spell them, and children are consecutive."""
    trees = AnswerTrees.of([answers], CPU)
    beginnings = {tuple(ids[:length]) for ids in answers for length in range(1 + len(ids))}
    spelled = []
    for node in range(trees.dummy):
        path = trees.paths[0, node, : int(trees.depths[0, node])]
        spelled.append(tuple(trees.tokens[0, path].tolist()))
        first, count = int(trees.first[0, node]), int(trees.counts[0, node])
        assert trees.parents[0, first : first + count].tolist() == [node] * count
    assert len(spelled) == len(beginnings) and set(spelled) == beginnings
    assert [spelled[end] for end in trees.ends[0].tolist()] == [tuple(ids) for ids in answers]
    assert int((trees.order[0] >= 0).sum()) == sum(
        1 for node in range(1, trees.dummy) if trees.counts[0, node]
    )


@pytest.mark.parametrize("family", WAYS)
def test_the_first_of_equally_likely_answers_wins(family: str) -> None:
    """Equal scores give the answer that comes first, however the answers are found.

    The head gives tokens 4 and 5 equal logits, and both end an answer after the same token.
    """
    backbone = backbone_of(family)
    head = backbone.model.get_output_embeddings()  # type: ignore[operator]
    answers = [[9, 3], [6, 5], [6, 4], [6, 7]]

    def equal(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
        changed = logits.clone()
        changed[..., 6] = changed.amax(-1) + 3  # so that one of the equal answers is the likeliest
        changed[..., 4] = changed[..., 5] = changed[..., 6] + 1
        return changed

    hook = head.register_forward_hook(equal)
    try:
        for order in ([0, 1, 2, 3], [0, 2, 1, 3]):
            trees = in_trees(backbone, [answers[place] for place in order], len(INPUTS))
            with torch.no_grad():
                for every in (True, False):
                    found = rank(backbone, None, INPUTS, [0] * len(INPUTS), trees, every=every)
                    assert found.given.tolist() == [1] * len(INPUTS)
                    assert (found.scores[:, 1] == found.scores[:, 2]).all()
    finally:
        hook.remove()


def many_answers(count: int, seed: int = 0) -> list[list[int]]:
    """Return different answers of two to six tokens, of which many begin alike."""
    choose = random.Random(seed)
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < count:
        length = choose.randint(2, 6)
        drawn[tuple(choose.randrange(2, 14) for _ in range(length))] = None
    return [list(ids) for ids in drawn]


def labelled(count: int, rows: int = 12) -> tuple[Encoded, object]:
    """Return rows that have one of many labels, and their encoder."""
    encoder = encoder_for("several tokens")
    encoder.answers = many_answers(count)
    choose = random.Random(1)
    labels = [row % count for row in range(rows)]
    inputs = random_ids([choose.randint(1, 12) for _ in range(rows)], seed=5)
    return Encoded(inputs, [encoder.ended_answers[label] for label in labels], labels), encoder


@pytest.mark.parametrize("metric", [None, "ece", "roc_auc"])
@pytest.mark.parametrize("family", WAYS)
def test_the_tree_can_be_switched_off(family: str, metric: str | None) -> None:
    """Evaluations with and without the tree have equal metrics, of packed trials and of each alone.

    ``ece`` and ``roc_auc`` need all probabilities.
    """
    split, encoder = labelled(10)
    backbone = backbone_of(family)
    prompts = prompts_of(backbone, "soft") or []
    alone = [evaluate(backbone, [prompt], split, encoder, metric=metric)[0] for prompt in prompts]
    together = evaluate(backbone, prompts, split, encoder, metric=metric)
    backbone.answers_as_tree = False
    without = evaluate(backbone, prompts, split, encoder, metric=metric)
    for tree, off, single in zip(together, without, alone, strict=True):
        assert tree == pytest.approx(off, rel=1e-5)
        assert tree == pytest.approx(single, rel=1e-5)
        assert metric is None or metric in tree


def test_outcomes_of_all_rows_agree_without_the_tree() -> None:
    """Where the outcomes of all rows are kept, all log-probabilities agree."""
    split, encoder = labelled(30)
    backbone = tiny_backbone()
    prompts = random_prompts(backbone, [4, 1])
    outcomes = []
    for backbone.answers_as_tree in (True, False):
        for metrics in evaluate(backbone, prompts, split, encoder, confusion=True):
            outcomes.append(metrics.outcomes.columns)  # type: ignore[attr-defined]
    for name in outcomes[0]:
        for tree, off in zip(outcomes[:2], outcomes[2:], strict=True):
            torch.testing.assert_close(
                torch.as_tensor(tree[name]), torch.as_tensor(off[name]), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("family", [*WAYS, *MASKED])
def test_served_scores_agree_without_the_tree(family: str) -> None:
    """Rows with different answers are scored in one forward, with and without the tree alike."""
    backbone = backbone_of(family)
    answers = [NESTED, [[5]], [[3], [4, 4]], many_answers(9), NESTED]
    found = []
    with torch.no_grad():
        prepared = backbone.prepare(random_prompts(backbone, [4, 1, 9]))
        for backbone.answers_as_tree in (True, False):
            found.append(answer_scores(backbone, prepared, INPUTS, [1, 0, 1, 2, 0], answers))
    for tree, off, choices in zip(*found, answers, strict=True):
        assert len(tree) == len(choices)
        torch.testing.assert_close(tree, off, rtol=1e-5, atol=1e-5)


def nodes_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which every forward of continuations appends the number of its columns."""
    counts: list[int] = []
    for way in (ranking._Branches, ranking._Copies, ranking._WholeRows):
        run = way.run

        def counted(
            self: object, trees: AnswerTrees, chosen: Tensor, run: object = run
        ) -> tuple[Tensor, Tensor, Tensor]:
            out = run(self, trees, chosen)  # type: ignore[operator]
            counts.append(out[1].numel())
            return out

        monkeypatch.setattr(way, "run", counted)
    return counts


@pytest.mark.parametrize("family", WAYS)
def test_answers_that_cannot_win_are_not_run(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the right answer is nearly certain, its target is all that runs.

    With all probabilities asked for, the other answers run too.
    """
    split, encoder = labelled(30)
    backbone = backbone_of(family)
    trees = in_trees(backbone, encoder.answers, 1)  # type: ignore[attr-defined]
    answer, target = split.labels[0], split.targets[0]
    head = backbone.model.get_output_embeddings()  # type: ignore[operator]

    def favour(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
        changed = logits.clone()
        changed[..., target] += 1000.0
        return changed

    counts = nodes_run(monkeypatch)
    right = [target], [answer]
    hook = head.register_forward_hook(favour)
    try:
        with torch.no_grad():
            pruned = rank(backbone, None, split.inputs[:1], [0], trees, right, every=False)
            few = sum(counts)
            every = rank(backbone, None, split.inputs[:1], [0], trees, right)
    finally:
        hook.remove()
    assert pruned.scores.isfinite().sum() < every.scores.isfinite().sum() == 30
    assert few < sum(counts) - few
    assert pruned.given.tolist() == every.given.tolist()


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("family", WAYS)
def test_memory_does_not_grow_with_the_number_of_answers(
    family: str, every: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forward of 150 labels has more columns than the limits allow, nor does a row's cache."""
    monkeypatch.setattr(ranking, "FORWARD_TOKENS", 100)
    monkeypatch.setattr(ranking, "KEPT_COLUMNS", 12)
    backbone = backbone_of(family)
    widths = []
    branch = type(backbone).branch if backbone.branches else None  # type: ignore[attr-defined]

    def watched(self: object, state: object, ids: Tensor, *more: Tensor) -> Tensor:
        widths.append(more[1].shape[2] - state.mask.shape[1])  # type: ignore[attr-defined]
        return branch(self, state, ids, *more)  # type: ignore[misc]

    if branch:
        monkeypatch.setattr(type(backbone), "branch", watched)
    counts = nodes_run(monkeypatch)
    trees = in_trees(backbone, many_answers(150), len(INPUTS))
    with torch.no_grad():
        found = rank(backbone, None, INPUTS, [0] * len(INPUTS), trees, every=every)
    assert not every or int(found.scores.isfinite().sum()) == 150 * len(INPUTS)
    # A piece of 20 columns a row, and up to five tokens before its first.
    assert max(counts) <= len(INPUTS) * (20 + 5)
    assert max(widths, default=0) <= 12 + 2 * (20 + 5)


def test_workers_of_a_sharded_model_run_equally_many_forwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The number of forwards depends on the answers only, neither on the rows nor on their scores.

    Every forward of a sharded model waits for all workers.
    """
    backbone = tiny_backbone()
    backbone.sharded = True
    counts = nodes_run(monkeypatch)
    answers = many_answers(40)
    forwards = []
    for inputs in (INPUTS, INPUTS[:1], INPUTS[3:]):
        right = [answers[len(ids)] for ids in inputs], [len(ids) for ids in inputs]
        counts.clear()
        with torch.no_grad():
            rank(
                backbone, None, inputs, [0] * len(inputs), in_trees(backbone, answers, len(inputs)),
                right, every=False,
            )  # fmt: skip
        forwards.append(len(counts))
    assert len(set(forwards)) == 1 and forwards[0] > 1
