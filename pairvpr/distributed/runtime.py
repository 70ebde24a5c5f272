"""Ray itself: where it runs, how its CPUs and GPUs are shared out, and the network inside an actor."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import psutil
import ray
import torch

from pairvpr.config.schema import ClusterConfig, DescribeConfig, ModelConfig, RerankConfig
from pairvpr.distributed.quiet import filtered_stderr
from pairvpr.models.weights import Weights, build_model
from pairvpr.retrieval.describe import Describer

CPUS_OF_A_SMALL_TASK = 0.1
SECONDS_TO_EXIT = 5.0


@contextmanager
def ray_session(config: ClusterConfig) -> Iterator[None]:
    """A connection to the cluster that `config` or RAY_ADDRESS names, or a Ray of its own on this machine.

    A Ray of its own ends with the block, and with this process however it dies.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    address = config.address or os.environ.get("RAY_ADDRESS")
    with filtered_stderr():
        if address:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        else:
            ray.init(
                num_cpus=config.num_cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
            )
        try:
            yield
        finally:
            # Of a cluster that goes on nothing is our child.
            children = psutil.Process().children(recursive=True)
            ray.shutdown()
            _end(children)


def _end(processes: list[psutil.Process]) -> None:
    """A Ray 2.60 worker can deadlock in its own exit handler (~Publisher), which would leave it for ever."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_TO_EXIT)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass(frozen=True)
class ActorPlan:
    """How many model actors run and what each reserves. It never changes a result."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    cpus_per_task: float
    """What a decoding task beside the actors reserves."""


def plan_actors(config: DescribeConfig | RerankConfig) -> ActorPlan:
    """Share out the cluster: actors take at most half of the CPUs, so that tasks always find some.

    A cluster that scales up from nothing shows no CPUs yet: actors then ask for what they would like.
    """
    resources = ray.cluster_resources()
    cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    gpus_per_actor = config.num_gpus_per_actor
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if gpus else 0.0
    num_actors = config.num_actors
    if num_actors is None:
        num_actors = int(gpus // gpus_per_actor) if gpus_per_actor else int(cpus // 2)
        num_actors = max(1, num_actors)
    wanted_cpus = 1.0 if gpus_per_actor else float(config.num_threads_per_actor)
    if not cpus:
        return ActorPlan(num_actors, wanted_cpus, gpus_per_actor, 1.0)
    cpus_per_actor = _rounded_down(min(wanted_cpus, cpus / 2 / num_actors))
    left = cpus - num_actors * cpus_per_actor - CPUS_OF_A_SMALL_TASK
    return ActorPlan(num_actors, cpus_per_actor, gpus_per_actor, _rounded_down(min(1.0, left)))


def _rounded_down(cpus: float) -> float:
    """Ray counts in steps of 1/10,000."""
    return int(cpus * 1000) / 1000


@dataclass(frozen=True)
class ModelSource:
    """What an actor needs to build the network: its shape, and its weights once in the object store."""

    config: ModelConfig
    weights: ray.ObjectRef[Weights]

    def describer(self, num_threads: int) -> Describer:
        """The network on this actor's GPU if it has one, else on its CPU threads."""
        torch.set_num_threads(num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return Describer(build_model(self.config, ray.get(self.weights), device))
