"""The benchmarks at toy size: fair comparisons and correct counts. No clock is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.models.backbone import CausalBackbone
from tests.benchmarks import accelerator, evaluation, labels, operations, overhead, serving, step
from tests.benchmarks.__main__ import main
from tests.benchmarks.measure import Comparison, Line, Skipped, table
from tests.benchmarks.memory import Step, measured
from tests.benchmarks.packing import Setting as Packing
from tests.benchmarks.packing import speed_lines
from tests.benchmarks.subjects import (
    TOY,
    Size,
    backbone_of,
    batches,
    make_backbone,
    make_model,
    make_rows,
)

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
ROWS, INPUT = 3, 5
LAYERED = Size(layers=6, width=32, inner=64, heads=4, kv_heads=2, vocabulary=300)


@pytest.fixture
def backbone() -> CausalBackbone:
    torch.manual_seed(0)
    return make_backbone(TOY, CPU, torch.float64)


def peft_like(prompt: nn.Module, tuned: Any, case: step.Case) -> None:
    """Copy our prompt's values into PEFT's prompt."""
    encoder = tuned.prompt_encoder["default"]
    ours = dict(prompt.named_parameters())
    with torch.no_grad():
        if case.method == "prompt_tuning":
            encoder.embedding.weight.copy_(ours["prompt"])
        elif case.method == "prefix_tuning":
            # From [L, 2, kv heads, P, width] to PEFT's [P, L x 2 x kv heads x width].
            encoder.embedding.weight.copy_(
                ours["sites.decoder.keys_values"].permute(3, 0, 1, 2, 4).flatten(1)
            )
        else:
            encoder.embedding.weight.copy_(ours["tokens"])
            for layer, name in zip((0, 2, 4), ("first", "middle", "last"), strict=True):
                encoder.mlp_head[layer].weight.copy_(ours[f"encoder.network.{name}.weight"])
                encoder.mlp_head[layer].bias.copy_(ours[f"encoder.network.{name}.bias"])


@pytest.mark.parametrize("case", step.CASES, ids=lambda case: case.name)
def test_both_sides_of_a_step_compute_the_same_loss(
    backbone: CausalBackbone, case: step.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With equal prompt values, PEFT's step has our loss and a gradient of the same norm."""
    rows = make_rows(ROWS, TOY.vocabulary, INPUT)
    prompt = step.our_prompt(backbone, case).double()
    tuned = step.peft_model(backbone, case).double()
    peft_like(prompt, tuned, case)
    monkeypatch.setattr(step, "peft_model", lambda *_: tuned)
    ours, peer = step.our_step(backbone, prompt, rows)(), step.peft_step(backbone, case, rows)()
    assert ours == pytest.approx(peer, rel=1e-6)  # PEFT's loss is a float32
    norms = [
        torch.stack([g.norm() for g in gradients(module)]).norm() for module in (prompt, tuned)
    ]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-4, atol=0)


def gradients(module: nn.Module) -> list[Tensor]:
    return [
        parameter.grad.double() for parameter in module.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("length", [1, 20])
def test_the_operations_counted_are_those_that_run(length: int) -> None:
    """Counted matrix products equal PEFT's exactly and ours within 5 %.

    Ours differ for two reasons. The backward pass skips what no gradient needs: the rows' first
    queries, keys and values. The last block computes queries of all tokens, though some are not
    read, and computes keys and values of the read tokens a second time.
    """
    model = make_model(LAYERED, CPU)
    backbone, case = backbone_of(model), step.Case("prompt_tuning", length)
    weights, rows = operations.Weights.of(model), make_rows(ROWS, LAYERED.vocabulary, INPUT)
    peer = products(step.peft_step(backbone, case, rows))
    tokens = ROWS * (length + INPUT + step.TARGET)
    assert peer == weights.operations(tokens, tokens, pairs=0)
    ours = products(step.our_step(backbone, step.our_prompt(backbone, case), rows))
    tokens = length + ROWS * (INPUT + step.TARGET - 1)
    counted = weights.operations(
        tokens, ROWS * step.TARGET, 0, spared_tokens=tokens - ROWS * step.TARGET
    )
    assert 0.95 * counted < ours < 1.05 * counted


def products(call: Any) -> int:
    """Return the floating-point operations of a call's unbatched matrix products.

    Attention and positions use batched products and are not counted.
    """
    call()
    with FlopCounterMode(display=False) as counter:
        call()
    counts = counter.get_flop_counts()["Global"]
    return sum(
        count for name, count in counts.items() if name in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )


def test_pairs_of_query_and_key() -> None:
    """A causal row of n tokens has 1 + 2 + ... + n pairs, plus n for each token before the row."""
    assert operations.causal_pairs(4) == 1 + 2 + 3 + 4
    assert operations.causal_pairs(3, before=10) == 11 + 12 + 13


def test_a_prefix_is_no_token_of_the_body() -> None:
    """A prefix only adds pairs to attention, on both sides."""
    weights = operations.Weights(body=100, head=10, layers=1, width=0)
    assert operations.repeated(weights, 20, 6, 2, 3, prefix=True) == 4 * 3 * 8 * 110
    assert operations.once(weights, 20, 6, 2, 3, prefix=True) == 4 * 3 * (7 * 100 + 2 * 10)
    assert operations.repeated(weights, 20, 6, 2, 3) == 4 * 3 * 28 * 110
    assert operations.once(weights, 20, 6, 2, 3) == 4 * ((20 + 21) * 100 + 6 * 10)


def test_ratios_are_taken_pair_by_pair() -> None:
    """A slow moment that hits both sides of a pair does not change the ratio."""
    comparison = Comparison("x", ours=[1.0, 10.0, 2.0], peer=[3.0, 30.0, 2.0])
    assert comparison.ratios() == (1.0, 3.0, 3.0)
    shown = comparison.line(more="yes").shown
    assert (
        shown["times faster"] == 3.0
        and shown["spread"] == "1.00 to 3.00"
        and shown["more"] == "yes"
    )


def test_a_table_has_a_heading_for_each_set_of_columns() -> None:
    """Table rows with the same columns share a heading."""
    printed = table([Line("a", {"x": 1.0}), Line("b", {"x": 2.0}), Line("c", {"y": "no"})])
    assert [row.split() for row in printed] == [
        ["what", "x"], ["a", "1"], ["b", "2"], ["what", "y"], ["c", "no"],
    ]  # fmt: skip


def test_every_row_is_used_once_until_they_run_out() -> None:
    """Trials take consecutive rows, and no row twice before all are used."""
    assert batches(2, 3, of=6) == [[0, 1, 2], [3, 4, 5]]
    assert batches(2, 3, of=4) == [[0, 1, 2], [3, 0, 1]]


def test_useful_operations_leave_padding_out(backbone: CausalBackbone) -> None:
    """Only padded tokens are left out: rows of one length have none, a shorter row does."""
    weights = operations.Weights.of(backbone.model)
    setting = accelerator.Setting(CPU, 1.0)
    even, uneven = make_rows(4, TOY.vocabulary, 30), make_rows(4, TOY.vocabulary, 28, 32)
    for split, padded in ((even, False), (uneven, True)):
        useful = accelerator.needed(weights, split, [[0, 1], [2, 3]], setting.prompt)
        computed = accelerator.computed(weights, split, [[0, 1], [2, 3]], setting)
        assert (useful < computed) if padded else (useful == computed)
    tokens, head = 2 * setting.prompt + 4 * 31, 4 * 2
    assert accelerator.needed(
        weights, even, [[0, 1], [2, 3]], setting.prompt
    ) == weights.operations(tokens, head, 0)


def test_the_peak_of_a_device_is_looked_up_by_its_name() -> None:
    """The more specific device name wins; an unknown device asks for --peak."""
    assert accelerator.known_peak("NVIDIA H200") == 989.0
    assert accelerator.known_peak("NVIDIA H100 PCIe") == 756.0
    assert accelerator.known_peak("NVIDIA H100 80GB HBM3") == 989.0
    with pytest.raises(accelerator.Skipped, match="--peak"):
        accelerator.known_peak("Abacus 2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has an accelerator")
def test_without_an_accelerator_its_benchmark_says_why_it_is_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A skipped benchmark gives no figures and no failure, only one line with the reason."""
    assert main(["accelerator"], tmp_path) == 0
    assert "skipped: torch has no accelerator" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_both_ways_to_score_answers_agree(backbone: CausalBackbone) -> None:
    """Running the input once for all answers or once per answer gives equal log-probabilities."""
    setting = evaluation.Setting(rows=4, device=CPU)
    split, encoder = evaluation.task(setting, backbone, answers=3, tokens=2)
    assert [len(ids) for ids in encoder.scored_answers] == [2, 2, 2]
    repeated = backbone_of(backbone.model, evaluation.OnceAnAnswer)
    found = [evaluation.scores(setting, kind, split, encoder) for kind in (backbone, repeated)]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_both_sides_of_many_labels_agree() -> None:
    """Trials evaluated as a tree and one by one have equal accuracy and loss."""
    try:
        subject = labels.make_subject(labels.Setting(labels=12, rows=5, trials=2, prompt=3))
    except Skipped as reason:
        pytest.skip(str(reason))
    assert {len(ids) for ids in subject.encoder.answers} <= set(range(2, 8))
    for tree, other in zip(*(subject.evaluate(side) for side in labels.SIDES), strict=True):
        assert tree == pytest.approx(other, rel=1e-4)


def test_a_part_within_a_part_counts_once() -> None:
    """Nested parts count once: the body is part of the model, and evaluations are not steps."""
    watch = overhead.Stopwatch()
    inner = watch.around("model", lambda: 1)
    assert watch.around("model", inner)() == 1
    assert list(watch.spent) == ["model"]
    watch = overhead.Stopwatch()
    watch.around("evaluation", watch.around("model", lambda: 1))()
    assert list(watch.spent) == ["evaluation"]


def test_the_parts_of_a_step_are_all_seen() -> None:
    """Model, optimiser, data and evaluation are all timed; their sum fits into the steps' time."""
    line = overhead.lines(overhead.Setting(sizes=("toy",), trials=2, batch=2, device=CPU))[0]
    spent = line.kept["seconds"]
    assert min(spent[part] for part in ("steps", "model", "optimiser", "data", "evaluation")) > 0
    assert spent["model"] + spent["optimiser"] + spent["data"] <= spent["steps"]
    assert spent["steps"] + spent["evaluation"] <= line.kept["round"]


def test_a_step_s_memory_grows_with_its_rows() -> None:
    """Sixteen trials of four long rows need more memory beyond the weights than one trial."""
    above = [measured(Step("toy", trials, 4, 200, 200, 5))["above"] for trials in (1, 16)]
    assert above[1] > above[0]


def test_packed_speed_has_a_line_for_each_count() -> None:
    """A line for each number of rows and trials."""
    setting = Packing("toy", trials=(1, 2), rows=(1, 3), pairs=1, device=CPU)
    names = [line.name for line in speed_lines(setting)]
    assert names == [
        "1 trials of 1 rows",
        "2 trials of 1 rows",
        "1 trials of 3 rows",
        "2 trials of 3 rows",
    ]


def test_all_of_it_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every benchmark prints its table and writes its figures."""
    for name, more in {
        "step": [],
        "packing": ["--only", "speed"],
        "evaluation": [],
        "accelerator": [],
        "tables": [],
        "whole_model": [],
    }.items():
        assert main([name, "--toy", "--pairs", "1", *more], tmp_path) == 0
        document = json.loads((tmp_path / f"{name}.json").read_text())
        assert document["machine"]["threads"] >= 1
        printed = capsys.readouterr().out
        assert document["rows"] and all(row["name"] in printed for row in document["rows"])


@pytest.mark.long
def test_served_answers_are_those_of_the_peer() -> None:
    """Our server and PEFT behind FastAPI give the same answers over HTTP.

    The printed figures are those that were measured.
    """
    setting = serving.Setting(
        "toy", (3,), prompts=2, clients=4, requests=6, inputs=5, pairs=1, peers=("batched",)
    )
    (line,) = serving.peer_lines(setting)
    assert line.kept["equal"] == 6
    assert all(
        float(line.shown[column]) > 0 for column in ("ours, req/s", "peer, req/s", "ours p99, ms")
    )


def test_neither_ray_nor_mlflow_is_needed() -> None:
    """All benchmarks import, and a step is measured, without loading Ray or MLflow."""
    program = (
        "import sys; from tests.benchmarks import __main__, memory; import peft;"
        "memory.measure_here(memory.Step('toy', 1, 2, 4, 6, 3));"
        "sys.exit(', '.join({'ray', 'mlflow'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
