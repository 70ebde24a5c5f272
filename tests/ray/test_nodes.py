"""Three nodes; one of them goes without a word."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from tests.support.runs import arguments, start_job, wait_until

QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@pytest.fixture
def nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """A head that runs no work and two workers of two CPUs each: three nodes, the workers listed."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 200 << 20,
            "_system_config": QUICK_HEALTH_CHECKS,
        },
    )
    workers = [cluster.add_node(num_cpus=2, object_store_memory=200 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    yield cluster, workers
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.parametrize("moment", ["never", "index/parts/*.npz", "reranked/*.parquet"])
def test_node_removed(
    city: Path, expected: bytes, tmp_path: Path, nodes: tuple[Cluster, list[Any]], moment: str
) -> None:
    cluster, workers = nodes
    line = arguments(
        city,
        tmp_path / "out",
        "index.num_shards=3",
        "describe.num_actors=2",
        "rerank.num_actors=3",
        "rerank.queries_per_unit=1",
    )
    driver = start_job("evaluate", line, RAY_ADDRESS=str(cluster.address))
    if moment != "never":
        wait_until(lambda: any((tmp_path / "out").glob(moment)), moment)
        cluster.remove_node(workers[0], allow_graceful=False)
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected
