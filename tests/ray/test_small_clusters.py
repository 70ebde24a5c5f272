"""What the plan of actors asks of a cluster: it must fit on a single CPU, and with GPUs, or end with a word."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import pytest
import ray

from pairvpr.config.compose import load_evaluations
from pairvpr.data.manifest import Manifest, folder_manifest
from pairvpr.distributed import describe as steps
from pairvpr.distributed.describe import Description, _described, describe
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.parts import Rows
from pairvpr.distributed.runtime import ActorPlan, plan_actors
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.models.weights import load_weights
from tests.support.runs import arguments, run_job


def test_one_cpu_and_three_actors(city: Path, expected: bytes, tmp_path: Path) -> None:
    line = arguments(city, tmp_path / "out", "cluster.num_cpus=1", "describe.num_actors=3", "rerank.num_actors=3")
    done = run_job("evaluate", line)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("num_actors", [1, 2, 3, 8])
def test_actors_leave_room_for_tasks(city: Path, num_actors: int) -> None:
    config = load_evaluations(arguments(city, "unused", f"describe.num_actors={num_actors}"))[0]
    plan = plan_actors(config.describe)
    num_cpus = ray.cluster_resources()["CPU"]
    assert plan.num_actors == num_actors
    assert plan.num_actors * plan.cpus_per_actor + plan.cpus_per_task < num_cpus


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("step", ["describe", "rerank"])
def test_gpus_that_this_machine_has_not_are_refused(city: Path, step: str) -> None:
    config = load_evaluations(arguments(city, "unused", f"{step}.num_gpus_per_actor=64"))[0]
    with pytest.raises(
        UserError, match=rf"^{step}.num_gpus_per_actor=64: Ray finds \d+ GPUs on this machine; expected"
    ):
        plan_actors(getattr(config, step))


class DiesAtOnce:
    """Stands for the network; its process ends while it is built, as one does that runs out of memory."""

    def __init__(self, **_: object) -> None:
        os._exit(1)

    def __call__(self, rows: Rows) -> Rows:
        return rows


@pytest.mark.usefixtures("local_ray")
def test_a_model_actor_that_never_starts_ends_the_run(
    city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "_Network", DiesAtOnce)
    monkeypatch.setattr(steps, "MAX_RESTARTS", 1)
    config = load_evaluations(arguments(city, "unused", "describe.num_actors=1"))[0]
    source = ModelSource(config.model, cast(Any, None))
    photos = folder_manifest(str(city / "queries"), "queries")
    description = Description(photos, str(tmp_path), 1, source, config.describe)
    words = "13 of 13 photos were not described: a model actor that died again and again .at most 1 restarts"
    with pytest.raises(IncompleteRunError, match=words):
        describe(description, "queries", needs_a_readable_photo=False)


@pytest.mark.usefixtures("local_ray")
def test_a_users_mistake_in_a_task_arrives_as_one_line(city: Path, tmp_path: Path) -> None:
    config = load_evaluations(arguments(city, "unused"))[0]
    source = ModelSource(config.model, ray.put(load_weights(config.model)))
    description = Description(Manifest.of("/nowhere", ["a.jpg"]), str(tmp_path), 1, source, config.describe)
    with pytest.raises(UserError, match=r"^/nowhere: this photo folder is missing .*, or a URL$"):
        describe(description, "database", needs_a_readable_photo=True)


@pytest.mark.usefixtures("local_ray")
def test_ray_data_accepts_actors_with_gpus(city: Path) -> None:
    """Ray checks the arguments when the pipeline is put together; it is not run."""
    config = load_evaluations(arguments(city, "unused"))[0]
    source = ModelSource(config.model, ray.put(load_weights(config.model)))
    photos = folder_manifest(str(city / "queries"), "queries")
    description = Description(photos, "unused", 1, source, config.describe)
    plan = ActorPlan(num_actors=1, cpus_per_actor=1.0, gpus_per_actor=1.0, cpus_per_task=1.0)
    with pytest.warns(match="ray_remote_args"):
        assert _described(description, [0], plan, "describe queries") is not None
