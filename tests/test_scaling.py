"""The arithmetic of docs/cluster/scaling.md, and its measurements at toy size."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path

import pytest

from orchestrator.search.workers import placement
from orchestrator.search.workers import running as search_module
from orchestrator.serving.prompts import store as prompt_store
from tests.benchmarks import prompt_stores, scaling
from tests.benchmarks.__main__ import main
from tests.benchmarks.subjects import SIZES

ROOT = Path(__file__).parents[1]


def test_a_search_s_demand() -> None:
    """Demand of 8000 trials with a report per minute, on a driver that takes 14 reports/s."""
    search = scaling.Search(gpus=1000, slots=8, round_s=60.0)
    assert search.seats == 8000
    assert search.demand() == pytest.approx(133.33, abs=0.01)
    assert search.fed(14.0) == pytest.approx(105.0)
    assert search.shortest_round(14.0) == pytest.approx(571.43, abs=0.01)
    assert search.fed(search.demand()) == pytest.approx(1000)
    assert search.waiting_calls() == 9000 and search.most_gpus(1000) == 111
    assert scaling.Search(trials=10, reports=3).driver_bytes(26e3) == 780e3


def test_a_service_s_size() -> None:
    """A virtual token has keys and values per layer; a token takes two operations per weight."""
    service = scaling.Service()
    assert service.prompt_bytes() == 2 * 16 * 512 * 20 * 2 == 655_360
    assert service.memory(beside=0) == 65.536e9
    assert service.held(2 << 30) == 3276
    assert service.cores(0.0005) == pytest.approx(5.0)
    assert service.gpus() == pytest.approx(10_000 * 50 * 2 * 1.24e9 / (989e12 * 0.3))


def test_the_constants_are_those_of_the_program() -> None:
    """The arithmetic's constants equal the code's; the 1B model is that of the benchmarks."""
    assert scaling.Search().slots == placement.GPU_SLOTS
    assert (
        prompt_store.MAX_BYTES == scaling.DEFAULT_BYTES
        and prompt_store.POLL_SECONDS == scaling.POLL_S
    )
    source = Path(search_module.__file__).read_text()
    assert f"CALLS = {scaling.ACTOR_CALLS:_}" in source and "max_concurrency=CALLS" in source, (
        "see scaling.md"
    )
    size, service = SIZES["1B"], scaling.Service()
    assert (size.layers, size.kv_heads * size.width // size.heads) == (
        service.layers,
        service.kv_width,
    )


@pytest.mark.parametrize("together", [True, False])
def test_reports_go_through_the_broker(together: bool) -> None:
    """All requested reports arrive, also of ended trials, whether workers take turns or not."""
    spent = asyncio.run(
        asyncio.wait_for(scaling.deliver(3, 2, over=5, wanted=30, together=together), 60)
    )
    assert spent > 0


def test_the_bytes_of_a_prompt_are_those_that_its_tensors_have() -> None:
    """The store counts bytes like the arithmetic: keys and values per layer and virtual token."""
    found = prompt_stores.measure_here(30, 10)
    toy = SIZES["toy"]
    width = toy.kv_heads * toy.width // toy.heads
    assert found["keys and values"] == 2 * toy.layers * width * prompt_stores.LENGTH * 4
    assert min(found[name] for name in ("load", "lookup", "request", "metrics, bytes")) > 0


@pytest.mark.long
@pytest.mark.slow
def test_all_of_it_runs_at_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every line is marked as measured, extrapolated, assumed or measured earlier."""
    assert main(["scaling", "--toy"], tmp_path) == 0
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    kinds = {scaling.MEASURED, scaling.EXTRAPOLATED, scaling.EARLIER, scaling.ASSUMED}
    assert {row["kind"] for row in rows[:-1]} == kinds and rows[-1]["name"] == "load of the machine"
    assert "store of 20 prompts" in capsys.readouterr().out


def test_the_page_says_which_figures_are_which() -> None:
    """Each table of docs/cluster/scaling.md has a column with that mark."""
    text = (ROOT / "docs" / "cluster" / "scaling.md").read_text()
    heads = re.findall(r"^(\|.*\|)\n\|[-|: ]+\|$", text, re.MULTILINE)
    assert len(heads) >= 3 and all("kind" in head or "measured" in head for head in heads)
