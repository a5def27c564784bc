"""A cluster whose Ray counts a GPU that torch can't use (old driver, or torch without CUDA)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from ray.cluster_utils import Cluster

NEEDS_NONE = pytest.mark.skipif(
    torch.cuda.is_available(), reason="torch can use this machine's GPUs"
)


@contextmanager
def hidden_gpu() -> Iterator[Cluster]:
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False},
    )
    try:
        yield made
    finally:
        made.shutdown()
