"""The gate with the outcomes of test rows: how sure a difference is, and what a job asks for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.data.outcomes.rows import GIVEN, TRUE, RowOutcomes
from orchestrator.errors import BadInput
from orchestrator.job.spec import JobSpec
from orchestrator.registry import EvaluationRecord, Registry
from orchestrator.registry.versions.outcomes import outcomes_path, read_outcomes

Make = Callable[..., Path]
ROWS = 400
TEST = "d" * 64  # the fingerprint of the test rows of make_artifact
NOISE = "; the difference is within noise (p is not below 0.05)"


def outcomes(right: int, first: int = 0) -> RowOutcomes:
    """Outcomes with so many right rows, beginning at ``first``."""
    given = np.zeros(ROWS, int)
    given[(np.arange(right) + first) % ROWS] = 1
    return RowOutcomes({TRUE: np.ones(ROWS, int), GIVEN: given})


@pytest.fixture
def publish(local: Registry, name: str, make_artifact: Make) -> Callable[..., int]:
    """Return a function that registers a version with so many right test rows."""
    with local.start_search(name, {}, {}) as search:
        run_id = search.run_id

    def call(right: int, first: int = 0, kept: bool = True, **changes: Any) -> int:
        artifact = make_artifact(accuracy=right / ROWS, **changes)
        found = outcomes(right, first) if kept else None
        return local.register(artifact, name, run_id, metric="accuracy", outcomes=found)

    return call


def contest(registry: Registry, name: str, version: int, promote_if: Any = "better") -> Any:
    return registry.auto_alias(name, version, "challenger", "accuracy", "max", promote_if)


def test_a_better_number_within_noise_is_promoted_and_said_to_be_noise(
    local: Registry, name: str, publish: Callable[..., int]
) -> None:
    """0.91 against 0.9075: one row more is enough for ``better``, and the reason says it is noise.

    The history of the alias keeps the sentence.
    """
    contest(local, name, publish(363))
    found = contest(local, name, publish(364, first=20))
    clause = "its test accuracy is 0.91, the champion's 0.9075: 21 rows better, 20 worse of 400, p"
    assert found.alias == "champion"
    assert clause in found.reason and "(McNemar)" in found.reason and NOISE in found.reason
    assert found.document()["confidence"]["p_value"] == pytest.approx(1.0)
    assert [it.reason for it in local.history(name) if it.alias == "champion"][-1] in found.reason


@pytest.mark.parametrize(("right", "alias"), [(364, "challenger"), (390, "champion")])
def test_a_job_may_ask_for_more_than_noise(
    local: Registry, name: str, publish: Callable[..., int], right: int, alias: str
) -> None:
    """``significantly_better`` keeps a champion that is within noise, and replaces one that is not.

    The first version becomes champion as ever. By hand, the better number is enough.
    """
    assert contest(local, name, publish(363), "significantly_better").alias == "champion"
    version = publish(right)
    found = contest(local, name, version, "significantly_better")
    assert found.alias == alias and (NOISE in found.reason) == (alias == "challenger")
    if alias == "challenger":
        assert "orchestrator evaluate" not in found.reason
        moved = local.promotion(name, version)
        assert (moved.before, moved.after) == (1, version) and NOISE in moved.reason
        assert moved.document()["confidence"]["better"] == 1


def test_without_outcomes_the_numbers_decide_and_the_confidence_is_unknown(
    local: Registry, name: str, publish: Callable[..., int]
) -> None:
    """A champion of an earlier release has no outcomes.

    ``better`` compares the numbers; ``significantly_better`` keeps the champion and names the
    command that records outcomes. After an evaluation of the champion on the test rows, the
    difference is tested.
    """
    contest(local, name, publish(363, kept=False))
    version = publish(390)
    found = contest(local, name, version, "significantly_better")
    assert found.alias == "challenger" and found.confidence is None
    assert "the confidence is unknown" in found.reason
    assert f"`orchestrator evaluate {name}:1 {name}:{version} --data PATH`" in found.reason
    record = EvaluationRecord("test.csv", "test", "", ROWS, TEST, {"accuracy": 0.9}, outcomes(363))
    local.log_evaluations(local.resolve(f"{name}:1"), [record])
    assert contest(local, name, version, "significantly_better").alias == "champion"
    third = publish(391, kept=False)
    unsure = contest(local, name, third)
    assert unsure.alias == "champion" and "the confidence is unknown" in unsure.reason
    assert "confidence" not in unsure.document()


def test_a_refused_promotion_says_how_sure_the_difference_is(
    local: Registry, name: str, publish: Callable[..., int]
) -> None:
    contest(local, name, publish(363))
    with pytest.raises(BadInput, match=r"0 rows better, 63 worse of 400, p < 0.0001 \(McNemar\)"):
        local.promote(name, publish(300))


def test_outcomes_are_read_back_and_only_for_their_rows(
    registry: Registry, name: str, make_artifact: Make
) -> None:
    """Outcomes are stored beside the prompt, which still loads, and belong to its test rows."""
    with registry.start_search(name, {}, {}) as search:
        kept = outcomes(363)
        version = registry.register(make_artifact(), name, search.run_id, outcomes=kept)
    summary = registry.resolve(f"{name}:{version}")
    found = read_outcomes(registry._store, summary, TEST)
    assert found is not None and found.columns.keys() == kept.columns.keys()
    assert all((found.columns[key] == kept.columns[key]).all() for key in kept.columns)
    assert read_outcomes(registry._store, summary, "e" * 64) is None
    assert sorted(file.name for file in registry.fetch(name, version).iterdir()) == [
        "manifest.json", "prompt.safetensors",
    ]  # fmt: skip


def test_damaged_outcomes_are_as_good_as_none(
    local: Registry, name: str, publish: Callable[..., int]
) -> None:
    """A file that was altered or deleted makes the confidence unknown, and stops no promotion."""
    contest(local, name, publish(363))
    source = local._store.client.get_model_version_download_uri(name, "1").removeprefix("file://")
    file = Path(source.replace("%20", " ").replace("%25", "%")) / outcomes_path(TEST)
    file.write_bytes(b"other")
    assert "confidence is unknown" in contest(local, name, publish(364)).reason
    file.unlink()
    local.rollback(name)
    assert "confidence is unknown" in contest(local, name, publish(365)).reason


def test_a_function_of_the_users_own_cannot_be_asked_to_be_significant() -> None:
    """The gate does not import the function, so the job is refused before anything is spent."""
    document: dict[str, Any] = {
        "name": "own",
        "base_model": {"id": "nobody/model"},
        "data": {
            "path": "nobody/rows", "template": "{text}?", "target": "label",
            "verbalizer": {0: " no", 1: " yes"},
        },
        "search": {"metric": "costs:missed"},
    }  # fmt: skip
    assert JobSpec.model_validate(document).search.metric == "costs:missed"
    document["registry"] = {"promote_if": "significantly_better"}
    with pytest.raises(ValueError, match=r"search\.metric costs:missed is a function of your own"):
        JobSpec.model_validate(document)
