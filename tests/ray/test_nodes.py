"""Three nodes; one of them goes without a word."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pairvpr.training.checkpoint import steps_done
from pairvpr.training.metrics_log import read_metrics
from tests.support import training
from tests.support.runs import arguments, start_job, wait_until

QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
}


@contextmanager
def _three_nodes(cpus_per_worker: int) -> Iterator[tuple[Cluster, list[Any]]]:
    """A head that runs no work and two workers: three nodes, the workers listed."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "include_dashboard": False,
            "object_store_memory": 200 << 20,
            "_system_config": QUICK_HEALTH_CHECKS,
        },
    )
    workers = [cluster.add_node(num_cpus=cpus_per_worker, object_store_memory=200 << 20) for _ in range(2)]
    cluster.wait_for_nodes()
    try:
        yield cluster, workers
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[tuple[Cluster, list[Any]]]:
    """Workers of two CPUs each."""
    with _three_nodes(2) as found:
        yield found


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("never", marks=pytest.mark.soak),
        pytest.param("index/parts/*.npz", marks=pytest.mark.soak),
        "reranked/*.parquet",
    ],
)
def test_node_removed(
    city: Path, expected_one_by_one: bytes, tmp_path: Path, nodes: tuple[Cluster, list[Any]], moment: str
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
        wait_until(lambda: any((tmp_path / "out").glob(moment)), moment, job=driver)
        cluster.remove_node(workers[0], allow_graceful=False)
    _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected_one_by_one


@pytest.mark.soak
@pytest.mark.parametrize("stage", training.STAGES)
def test_node_lost_while_training(tmp_path: Path, stage: int) -> None:
    """Each node has room for one of two workers; another node takes the lost one's place."""
    training.draw_training_set(tmp_path)
    more = ("train.num_workers=2", "train.checkpoint_every_steps=1")
    training.train_on_ranks(stage, training.arguments(stage, tmp_path, tmp_path / "undisturbed", *more), 2, tmp_path)
    expected, output = read_metrics(str(tmp_path / "undisturbed")), str(tmp_path / "out")
    with _three_nodes(1) as (cluster, workers):
        line = training.arguments(stage, tmp_path, tmp_path / "out", *more)
        driver = start_job(training.JOBS[stage], line, RAY_ADDRESS=str(cluster.address))
        wait_until(lambda: len(read_metrics(output)) >= 2, "the second step", job=driver)
        cluster.remove_node(workers[0], allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        _, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, err
    assert training.losses(read_metrics(output)) == training.losses(expected)


@pytest.mark.soak
def test_a_node_that_announces_its_end_loses_no_step(tmp_path: Path) -> None:
    """As pods of deploy/kubernetes do when a spot node is taken away. Nothing else asks for one so early."""
    training.draw_training_set(tmp_path)
    more = ("train.num_workers=2", "train.epochs=40", "train.keep_every_epochs=40")
    training.train_on_ranks(2, training.arguments(2, tmp_path, tmp_path / "undisturbed", *more), 2, tmp_path)
    expected, output = read_metrics(str(tmp_path / "undisturbed")), str(tmp_path / "out")
    with _three_nodes(1) as (cluster, workers):
        line = training.arguments(2, tmp_path, tmp_path / "out", *more)
        driver = start_job("train_stage_two", line, RAY_ADDRESS=str(cluster.address))
        wait_until(lambda: len(read_metrics(output)) >= 2, "the second step", job=driver)
        drain = ["drain-node", f"--address={cluster.address}", f"--node-id={workers[0].node_id}"]
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the pod ends"]
        ray_command = str(Path(sys.executable).with_name("ray"))
        subprocess.run([ray_command, *drain, *reason, "--deadline-remaining-seconds=20"], check=True, timeout=60)
        wait_until(lambda: steps_done(output) % 5 != 0, "a checkpoint within an epoch")
        cluster.remove_node(workers[0], allow_graceful=False)
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        _, err = driver.communicate(timeout=500)
    assert driver.returncode == 0, err
    assert training.losses(read_metrics(output)) == training.losses(expected)
