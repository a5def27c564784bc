"""A job from spec to registered model, on a real Ray and a real MLflow store."""

from __future__ import annotations

from small_jobs import Finished


def test_x(finished: Finished) -> None:
    import json
    print(json.dumps(finished.document, indent=1)); print(finished.said, finished.left_behind)
    assert 0
