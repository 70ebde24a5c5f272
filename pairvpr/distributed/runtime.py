"""Ray itself: where it runs, and how CPUs and GPUs are divided among actors. It works without torch."""

from __future__ import annotations

import logging
import math
import os
import resource
import shutil
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import ray

from pairvpr.config.schema import ClusterConfig, DescribeConfig, RerankConfig
from pairvpr.data import storage
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.machine import in_a_line
from pairvpr.terminal import say

ALONE = "pairvpr-alone"
"""Ray's namespace in a local Ray instance, to which no node is ever added."""
SMALLEST_SHARE_OF_A_CPU = 0.001
SECONDS_TO_EXIT = 5.0
SECONDS_TO_CONNECT = 5.0
MIN_OPEN_FILES = 256
MIN_FREE_BYTES = 64 << 20
SHARED_MEMORY = "/dev/shm"
NO_METRICS = {"RAY_enable_metrics_collection": "0", "AUTOSCALER_METRIC_PORT": "-1", "DASHBOARD_METRIC_PORT": "-1"}
_share_cpus = math.inf
"""CPUs that this process's job keeps to, of a cluster that it shares with others."""


@contextmanager
def ray_session(config: ClusterConfig, variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Connect to the cluster named by `config` or RAY_ADDRESS, or start a local Ray instance.

    `variables` are set in the environment of all actors and tasks. On a cluster the job keeps to `config.num_cpus`, as
    far as it decides how much runs at once. A local instance ends with the block, and with this process, however it
    dies.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    environment = {"env_vars": dict(variables)} if variables else None
    not_rays = set(psutil.Process().children(recursive=True))
    global _share_cpus
    try:
        address = config.address or os.environ.get("RAY_ADDRESS")
        if address:
            _connect(address, "cluster.address" if config.address else "RAY_ADDRESS", environment)
            _share_cpus = config.num_cpus or math.inf
        else:
            _start(config.num_cpus, environment)
        yield
    finally:
        _share_cpus = math.inf
        # None of a remote cluster's processes is our child.
        children = set(psutil.Process().children(recursive=True)) - not_rays
        ray.shutdown()
        _end(list(children))


def _start(num_cpus: int | None, environment: dict[str, Any] | None) -> None:
    """A Ray of its own. Raises `UserError` or `IncompleteRunError` where this machine does not let it start."""
    folder, variable = _ray_folder()
    _check_limits(folder, variable)
    stop = signal.getsignal(signal.SIGTERM)
    shared_memory_bytes = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None
    try:
        with _no_metrics():
            ray.init(
                num_cpus=num_cpus,
                namespace=ALONE,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                runtime_env=environment,
            )
    except Exception as error:
        raise IncompleteRunError(
            f"Ray can't start on this machine: {in_a_line(error)}; expected free ports, processes and memory, and a "
            f"short path for its files ({variable}={folder})"
        ) from error
    _say_if_too_small(shared_memory_bytes, folder)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)  # Ray has installed its own, which ends the process silently


@contextmanager
def _no_metrics() -> Iterator[None]:
    """Processes that Ray starts within the block serve no metrics, unless the environment says otherwise.

    Ray listens on all network interfaces. It requires the token that it generates for this user, unless RAY_AUTH_MODE
    says otherwise. Metrics need no token, so no port serves them; Ray logs that -1 can't be opened.
    """
    ours = {name: value for name, value in NO_METRICS.items() if name not in os.environ}
    os.environ |= ours
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)  # else a cluster that this process starts later would serve none either


def _say_if_too_small(shared_memory_bytes: int | None, folder: str) -> None:
    """Ray puts its object store on the disk, without a word, where shared memory had less room than it wants."""
    wanted_bytes = int(ray.cluster_resources().get("object_store_memory", 0.0))
    if shared_memory_bytes is not None and shared_memory_bytes < wanted_bytes:
        say(
            f"Ray: {SHARED_MEMORY} has {shared_memory_bytes >> 20:,} MiB and the object store wants "
            f"{wanted_bytes >> 20:,} MiB, so it lies in {folder}, which is slower; a container gets more by --shm-size"
        )


def _ray_folder() -> tuple[str, str]:
    """The folder for a local instance's files, and the environment variable that set it."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "RAY_TMPDIR")
    return os.environ.get(variable, "/tmp"), variable


def _check_limits(folder: str, variable: str) -> None:
    """Raise `UserError` for conditions on which Ray would fail silently, or only after minutes.

    It ends this process where it may open too few files, and tries for long to write its files and reach its ports.
    """
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most_files != resource.RLIM_INFINITY and most_files < MIN_OPEN_FILES:
        raise UserError(
            f"Ray needs {MIN_OPEN_FILES} open files, but this process may open only {most_files}; expected `ulimit -n "
            "65536`"
        )
    with suppress(OSError):  # Ray creates the folder, or reports well enough why it can't
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < MIN_FREE_BYTES:
            raise UserError(
                f"{variable}={folder}: Ray keeps its files there, but the disk has only {free_bytes >> 20} MiB free; "
                "expected "
                f"{MIN_FREE_BYTES >> 20} MiB"
            )
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=SECONDS_TO_CONNECT).close()
    except OSError as error:
        raise UserError(
            f"Ray's processes communicate over 127.0.0.1, which does not work: {in_a_line(error)}; expected a loopback "
            "interface that is up, and free ports"
        ) from error


def _connect(address: str, key: str, environment: dict[str, Any] | None) -> None:
    """Raises `UserError`, naming the setting `key`, if no cluster answers."""
    if address.startswith(("http://", "https://")):
        raise UserError(f"{key}={address}: this is the dashboard's address, for `ray job submit`; expected HOST:6379")
    _check_reachable(address, key)
    try:
        connected: Any = ray.init(
            address=address, logging_level=logging.ERROR, log_to_driver=False, runtime_env=environment
        )
    except (ConnectionError, ValueError) as error:
        raise UserError(
            f"{key}={address}: {storage.reason(error)}; expected HOST:PORT of a running cluster, or auto"
        ) from error
    dashboard = f", dashboard http://{connected.dashboard_url}" if connected.dashboard_url else ""
    say(f"Ray: job {ray.get_runtime_context().get_job_id()} of the cluster at {address}{dashboard}")


def _check_reachable(address: str, key: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"{key}={address}: nothing answers there ({error}); expected a running cluster") from error


def _end(processes: list[psutil.Process]) -> None:
    """A Ray 2.60 worker can deadlock in its own exit handler (~Publisher) and would then never end."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS_TO_EXIT)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@dataclass(frozen=True)
class ActorPlan:
    """The number of model actors and the resources that each reserves. Never changes a result."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    cpus_per_task: float
    """CPUs that a decoding task reserves."""

    def actor_options(self) -> dict[str, Any]:
        """Ray's options of one such actor.

        Threads read photos and features, and glibc's malloc keeps freed memory in up to eight arenas per core. Without
        a limit on arenas, an actor grows with the photos that it has seen.
        """
        return {
            "num_cpus": self.cpus_per_actor,
            "num_gpus": self.gpus_per_actor,
            "scheduling_strategy": "SPREAD",
            "runtime_env": {"env_vars": {"MALLOC_ARENA_MAX": "2"}},
        }


def plan_actors(config: DescribeConfig | RerankConfig) -> ActorPlan:
    """Divide the cluster: all actors together fit into half of one node, so that tasks always find CPUs.

    This holds even when nodes vanish and every actor restarts on the last one. Actors that took all of its CPUs would
    wait forever for tasks that find none. Actors are spread over the nodes whatever they reserve.

    A cluster that scales up from zero shows no CPUs yet, so the number of actors must be given. It may also gain GPUs
    later, so only a local Ray instance refuses actors that need more than there are.
    """
    cpus, gpus = job_cpus(), ray.cluster_resources().get("GPU", 0.0)
    section = "describe" if isinstance(config, DescribeConfig) else "rerank"
    if not cpus and (config.num_actors is None or config.num_gpus_per_actor is None):
        raise UserError(
            f"the cluster has no CPUs until it scales up; expected {section}.num_actors and "
            f"{section}.num_gpus_per_actor"
        )
    gpus_per_actor = config.num_gpus_per_actor
    if gpus_per_actor is None:
        gpus_per_actor = 1.0 if gpus else 0.0
    if gpus_per_actor > most_gpus_of_a_node() and ray.get_runtime_context().namespace == ALONE:
        raise UserError(
            f"{section}.num_gpus_per_actor={gpus_per_actor:g}: Ray finds {gpus:g} GPUs on this machine; expected "
            "at most that, or cluster.address of a cluster that has them"
        )
    num_actors = config.num_actors
    if num_actors is None:
        num_actors = int(gpus // gpus_per_actor) if gpus_per_actor else int(cpus // 2)
        num_actors = max(1, num_actors)
    wanted_cpus = 1.0 if gpus_per_actor else float(config.num_threads_per_actor)
    if not cpus:
        return ActorPlan(num_actors, wanted_cpus, gpus_per_actor, 1.0)
    smallest = smallest_node_cpus()
    cpus_per_actor = max(SMALLEST_SHARE_OF_A_CPU, _rounded_down(min(wanted_cpus, smallest / 2 / num_actors)))
    return ActorPlan(num_actors, cpus_per_actor, gpus_per_actor, _rounded_down(min(1.0, smallest / 4)))


def job_cpus() -> float:
    """CPUs of the cluster, or this job's share of them; 0 before a cluster scales up."""
    return min(ray.cluster_resources().get("CPU", 0.0), _share_cpus)


def smallest_node_cpus() -> float:
    """CPUs of the smallest node that has any, or this job's share if that is less; 1 if there is no node."""
    of_nodes = (cpus for node in ray.nodes() if node["Alive"] and (cpus := node["Resources"].get("CPU")))
    return min(min(of_nodes, default=1.0), _share_cpus)


def share_cpus() -> float | None:
    """CPUs that this job keeps to, where `cluster.num_cpus` says so."""
    return None if _share_cpus == math.inf else _share_cpus


def cluster_memory_bytes() -> float:
    """Memory of all nodes that Ray may use, its object store included."""
    resources = ray.cluster_resources()
    return resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)


def cpus_of_a_shard() -> float:
    """A whole CPU if a node has one: this bounds how many shards are in a node's memory at once."""
    return min(1.0, smallest_node_cpus())


def most_gpus_of_a_node() -> float:
    """GPUs of the node with the most."""
    return max((node["Resources"].get("GPU", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)


def has_gpu() -> bool:
    """Whether Ray gave this actor a GPU."""
    return bool(ray.get_runtime_context().get_accelerator_ids().get("GPU"))


def _rounded_down(cpus: float) -> float:
    """Rounded down to Ray's resolution of 1/10,000."""
    return int(cpus * 1000) / 1000
