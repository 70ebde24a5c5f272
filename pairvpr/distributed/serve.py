"""The service on Ray Serve: the app of `pairvpr.serving` as deployments, in one piece or split.

In one piece, a replica holds door, network and all shards. Split, the door calls the network and the shards in other
replicas; they call the same objects (`pairvpr.engines`) with the same photos in each forward pass.

A call belongs to one generation, which the door names. A replica that does not hold it opens it first.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import Any, Generic, TypeVar, cast

import numpy as np
import ray
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from pairvpr.config.schema import IndexKind, ModelConfig, SearchConfig
from pairvpr.config.serve_schema import ServeSettings
from pairvpr.data.local_cache import LocalCache, cache_directory
from pairvpr.deadline import Deadline, TooLateError
from pairvpr.distributed.network import own_device
from pairvpr.distributed.runtime import ALONE, most_gpus_of_a_node
from pairvpr.engines import Described, Explained, LocalShards, Scored, effort_of
from pairvpr.errors import UserError
from pairvpr.index import choose
from pairvpr.index.filters import Filters, Places
from pairvpr.index.merge import Found, merge_top_k
from pairvpr.index.reader import short_list_length
from pairvpr.localizer import OpenShards, local_shards
from pairvpr.opened import Generation, GenerationKey
from pairvpr.photo import Asked
from pairvpr.retrieval.rerank import WorkUnit
from pairvpr.serving.app import create_app
from pairvpr.serving.metrics import Metrics
from pairvpr.serving.opening import Opening, ServedIndex, read_token
from pairvpr.serving.service import Service

T = TypeVar("T")
APP = "pairvpr"
GENERATIONS_HELD = 3
"""Of each index, by a replica: the served one, the next, and one that requests may still ask for."""
TRIES, BETWEEN_TRIES_S = 5, 0.2
LOOKED_EVERY_S = 0.25
"""How often a waiting door looks whether its client is still there."""
HEALTH: dict[str, Any] = {"health_check_period_s": 2.0, "health_check_timeout_s": 10.0}
PREPARED_S, READY_S = 600.0, 5.0
HAPROXY_FILES: Mapping[str, str] = {
    "CONFIG_FILE_LOC": "haproxy.cfg",
    "SOCKET_PATH": "admin.sock",
    "METRICS_SOCKET_PATH": "metrics.sock",
    "SERVER_STATE_BASE": "",
    "SERVER_STATE_FILE": "server-state",
}
HAPROXY: Mapping[str, str] = {
    "RAY_SERVE_HAPROXY_STATS_PORT": "8404",
    "RAY_SERVE_HAPROXY_METRICS_PORT": "9101",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": "8500",
    # HAProxy holds requests up to this size in full, see RETRY_ON.
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(1 << 20),
    # Two buffers each: at most 1 GiB.
    "RAY_SERVE_HAPROXY_MAXCONN": "512",
    # The dead one has the fewest requests, so that it would be chosen again until it counts as down.
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    "RAY_SERVE_HAPROXY_RETRIES": "3",
    # A client that falls silent.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "30",
    # A replica that ends gets no new requests after this; Ray's 30 s are for load balancers that ask it seldom.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}
RETRY_ON = """conn-failure empty-response
    option http-buffer-request
    timeout http-request {}ms"""
"""Value of HAProxy's `retry-on`: a request whose replica dies goes to another one. Answering it twice does no harm.

HAProxy can only repeat what it held in full before it passed it on. So it waits for the header, and then for the body,
at most `serve.body_timeout_s` each. Ray has no variables for those two lines, and writes this value as it is into
HAProxy's file.
"""
MOST_HAPROXY_MS = 2**31 - 1
MOST_TOGETHER = 32
"""Photos that share a describing pass with serve.batch_wait_s."""


class LostReplicaError(OSError):
    """The replicas of a deployment died, or did not take the call, again and again."""


@contextmanager
def haproxy_variables(settings: ServeSettings) -> Iterator[dict[str, str]]:
    """Environment variables by which Ray Serve puts HAProxy in front; none without `settings.haproxy`.

    What the environment says already stays. On this machine HAProxy's files, among them a socket that obeys everybody,
    lie in a folder of this user's, which ends with the block; on other nodes Ray makes a folder of that name, open to
    all. It is in /tmp, because HAProxy takes no socket path above 97 characters, and Ray adds 57 for the node.
    """
    if not settings.haproxy:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="haproxy-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        files = {f"RAY_SERVE_HAPROXY_{name}": os.path.join(folder, file) for name, file in HAPROXY_FILES.items()}
        retry_on = RETRY_ON.format(min(math.ceil(1000 * settings.body_timeout_s), MOST_HAPROXY_MS))
        wanted = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_HAPROXY_RETRY_ON": retry_on, **files, **HAPROXY}
        yield {name: value for name, value in wanted.items() if name not in os.environ}


def haproxy_ports(host: str) -> dict[str, tuple[str, str]]:
    """Address and port, by the variable that sets it, of what HAProxy opens besides the service at `host`.

    Ray fixes the address of statistics and counters. The third port is that of Ray Serve's own proxy, the reserve.
    """
    addresses = {
        "RAY_SERVE_HAPROXY_STATS_PORT": "0.0.0.0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": "0.0.0.0",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": host,
    }
    return {name: (address, os.environ.get(name, HAPROXY[name])) for name, address in addresses.items()}


def drain(seconds: float) -> None:
    """Let every door answer what it has accepted, and nothing more; at most so long."""
    with suppress(TimeoutError, RayError, RayServeException, RuntimeError):  # no doors: nothing to wait for
        serve.get_app_handle(APP).broadcast("drain").results(timeout_s=seconds)


def application(opening: Opening) -> serve.Application:
    """The deployments of these settings."""
    settings = opening.config.serve
    return _split(opening) if settings.split else _whole(opening)


def _whole(opening: Opening) -> serve.Application:
    settings = opening.config.serve
    return (
        cast(Any, Whole)
        .options(
            **_replicas(opening, settings.num_replicas),
            max_ongoing_requests=settings.max_connections,
            ray_actor_options=_resources(opening, settings.num_replicas, opening.config.rerank.num_threads_per_actor),
        )
        .bind(opening)
    )


def _split(opening: Opening) -> serve.Application:
    settings, config = opening.config.serve, opening.config
    num_shards = settings.num_shard_parts * settings.num_shard_replicas
    num_all = settings.num_doors + settings.num_replicas + num_shards
    network = (
        cast(Any, NetworkReplica)
        .options(
            **_replicas(opening, settings.num_replicas),
            max_ongoing_requests=MOST_TOGETHER if settings.batch_wait_s else settings.num_at_once,
            ray_actor_options=_resources(opening, num_all, config.rerank.num_threads_per_actor),
        )
        .bind(opening)
    )
    parts = [
        cast(Any, ShardsReplica)
        .options(
            name=f"shards-{part}",
            num_replicas=settings.num_shard_replicas,
            max_ongoing_requests=settings.max_connections,
            graceful_shutdown_timeout_s=settings.drain_s,
            ray_actor_options=_resources(opening, num_all, config.index.num_threads_per_actor, has_gpu=False),
            **HEALTH,
        )
        .bind(opening, part)
        for part in range(settings.num_shard_parts)
    ]
    return (
        cast(Any, Door)
        .options(
            num_replicas=settings.num_doors,
            max_ongoing_requests=settings.max_connections,
            graceful_shutdown_timeout_s=settings.drain_s,
            ray_actor_options=_resources(opening, num_all, 1, has_gpu=False),
            **HEALTH,
        )
        .bind(opening, network, parts)
    )


def _replicas(opening: Opening, number: int) -> dict[str, Any]:
    """How many replicas compute, and how they end."""
    settings = opening.config.serve
    how: dict[str, Any] = {"graceful_shutdown_timeout_s": settings.drain_s, **HEALTH}
    if settings.max_replicas is None:
        return {"num_replicas": number, **how}
    bounds = {"min_replicas": number, "max_replicas": settings.max_replicas}
    return {"autoscaling_config": {**bounds, "target_ongoing_requests": settings.num_at_once}, **how}


def _resources(opening: Opening, num_all: int, num_threads: int, *, has_gpu: bool = True) -> dict[str, Any]:
    """What a replica reserves. A local Ray instance, to which no node is added, has room for all of them."""
    cpus = float(num_threads)
    if ray.get_runtime_context().namespace == ALONE:
        cpus = min(cpus, math.floor(1000 * ray.cluster_resources().get("CPU", 1.0) / num_all) / 1000)
    gpus = opening.config.rerank.num_gpus_per_actor
    if gpus is None:
        gpus = 1.0 if most_gpus_of_a_node() else 0.0
    environment = {"env_vars": {"MALLOC_ARENA_MAX": "2"}}
    return {"num_cpus": cpus, "num_gpus": gpus if has_gpu else 0.0, "runtime_env": environment}


@serve.deployment(name="whole")
@serve.ingress()
class Whole:
    """Door, network and all shards in one process."""

    def __init__(self, opening: Opening) -> None:
        network = opening.network(own_device())
        localizers = opening.localizers(network, lambda _: local_shards(opening.config.index, math.inf))
        metrics = Metrics()
        metrics.watch({"cached_bytes": ("Features of candidates in memory.", lambda: network.cached_bytes)})
        self._service = Service(localizers, opening.config.serve, metrics)
        self._token = read_token(opening.config)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it once. Its proxy sends the ids of requests."""
        return create_app(self._service, self._token, sends_request_id=False)

    async def drain(self) -> None:
        """See `Service.drain`."""
        await self._service.drain()


@serve.deployment(name="door")
@serve.ingress()
class Door:
    """Takes requests and decodes photos; network and shards are elsewhere."""

    async def __init__(self, opening: Opening, network: DeploymentHandle, parts: list[DeploymentHandle]) -> None:
        self._token = read_token(opening.config)
        self._service = await asyncio.to_thread(self._opened, opening, network, parts)

    def _opened(self, opening: Opening, network: DeploymentHandle, parts: list[DeploymentHandle]) -> Service:
        """In a thread, because it waits for other replicas."""
        config, settings = opening.config, opening.config.serve
        at_once = settings.num_at_once * (settings.max_replicas or settings.num_replicas) / settings.num_doors
        settings = replace(settings, num_at_once=math.ceil(at_once))
        elsewhere = RemoteNetwork(network, opening)

        def is_there() -> bool:
            return all(_is_there(handle) for handle in (network, *parts))

        def open_shards(_: ServedIndex) -> OpenShards:
            return lambda generation, _: RemoteShards(parts, network, generation, config.index)

        return Service(opening.localizers(elsewhere, open_shards), settings, Metrics(), is_there)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls it once. Its proxy sends the ids of requests."""
        return create_app(self._service, self._token, sends_request_id=False)

    async def drain(self) -> None:
        """See `Service.drain`."""
        await self._service.drain()


class _Held(Generic[T]):
    """The generations of each index, by directory, that a replica has open; the least recently used one is let go.

    `open_it` gets a generation, and what is open of another one of the same index. No other directory is opened.
    """

    def __init__(self, opening: Opening, open_it: Callable[[Generation, T | None], T]) -> None:
        self._indices = {index.directory: index for index in opening.indices.values()}
        self._open, self._opening, self._lock = open_it, Lock(), Lock()
        self._held: dict[str, OrderedDict[GenerationKey, T]] = {name: OrderedDict() for name in self._indices}

    def get(self, key: GenerationKey) -> T:
        """One of them, opened if it is not. While one is opened, which takes long, others are given out.

        Raises `UserError` if the generation of this number is another one meanwhile.
        """
        held = self._held[key.directory]
        found = self._given_out(held, key)
        if found is None:
            with self._opening:
                found = self._given_out(held, key)
                if found is None:
                    generation = self._indices[key.directory].open(key.number)
                    if generation.key != key:
                        raise UserError(f"index {key.directory} was built anew; expected a new start of the service")
                    found = self._open(generation, next(reversed(held.values()), None))
                    with self._lock:
                        held[key] = found
                        while len(held) > GENERATIONS_HELD:
                            held.popitem(last=False)
        return found

    def _given_out(self, held: OrderedDict[GenerationKey, T], key: GenerationKey) -> T | None:
        with self._lock:
            if key in held:
                held.move_to_end(key)
            return held.get(key)


async def _in_thread(work: Callable[[Deadline], T], left_s: float) -> T:
    """The result of `work`, which stops when its caller is gone."""
    deadline = Deadline(left_s)
    try:
        return await asyncio.to_thread(work, deadline)
    except asyncio.CancelledError:
        deadline.cancel()
        raise


@serve.deployment(name="network")
class NetworkReplica:
    """The network: describes photos and scores pairs."""

    def __init__(self, opening: Opening) -> None:
        self._network = opening.network(own_device())
        self._held = _Held[Generation](opening, lambda generation, _: generation)
        self._is_shared = opening.config.serve.batch_wait_s > 0
        if self._is_shared:
            self._described_together.set_batch_wait_timeout_s(opening.config.serve.batch_wait_s)  # type: ignore[attr-defined]

    async def is_there(self) -> None:
        """Answers once the replica is open."""

    async def prepare(self, key: GenerationKey) -> None:
        """Open a generation."""
        await asyncio.to_thread(self._held.get, key)

    async def describe(self, photos: list[Asked], left_s: float) -> Described:
        """See `pairvpr.engines.Network`."""
        if self._is_shared and len(photos) == 1:
            return await self._described_together(photos[0])
        return await _in_thread(partial(self._network.describe, photos), left_s)

    @serve.batch(max_batch_size=MOST_TOGETHER)
    async def _described_together(self, photos: list[Asked]) -> list[Described]:
        """Photos of different requests in one pass, whose rounding depends on their number."""
        return _apart(await asyncio.to_thread(self._network.describe, photos, Deadline()), len(photos))

    async def score(
        self,
        key: GenerationKey,
        photos: list[Asked],
        embedded: Tensor | None,
        units: list[WorkUnit],
        left_s: float,
    ) -> Scored:
        """See `pairvpr.engines.Network`."""

        def work(deadline: Deadline) -> Scored:
            return self._network.score(self._held.get(key), photos, embedded, units, deadline)

        return await _in_thread(work, left_s)

    async def pair_score(self, photo: Asked, other: Asked, left_s: float) -> float:
        """See `pairvpr.engines.Network`."""
        return await _in_thread(partial(self._network.pair_score, photo, other), left_s)

    async def explained(self, photo: Asked, other: Asked, left_s: float) -> Explained:
        """See `pairvpr.engines.Network`."""
        return await _in_thread(partial(self._network.explained, photo, other), left_s)


def _apart(described: Described, number: int) -> list[Described]:
    """What describing a number of photos together gave, for each of them. A photo alone keeps its dense features."""
    if number == 1:
        return [described]
    row_of = {place: row for row, place in enumerate(described.places.tolist())}
    return [_one_of(described, place, row_of.get(place)) for place in range(number)]


def _one_of(described: Described, place: int, row: int | None) -> Described:
    """The part of one photo, as if it had been alone."""
    rows = slice(0, 0) if row is None else slice(row, row + 1)
    broken = {0: described.broken[place]} if place in described.broken else {}
    return Described(np.zeros(rows.stop - rows.start, np.int64), described.descriptors[rows], broken)


@serve.deployment
class ShardsReplica:
    """A part of the shards of every index."""

    def __init__(self, opening: Opening, part: int) -> None:
        search, num_parts = opening.config.index, opening.config.serve.num_shard_parts
        files = LocalCache(cache_directory(search.cache_dir), int(search.cache_gib * 2**30))

        def opened(generation: Generation, before: tuple[Generation, LocalShards] | None) -> Any:
            shared = None if before is None else before[1]
            return generation, LocalShards(generation, search, files, math.inf, shared, part, num_parts)

        self._held = _Held[tuple[Generation, LocalShards]](opening, opened)

    async def is_there(self) -> None:
        """Answers once the replica is open."""

    async def prepare(self, key: GenerationKey) -> None:
        """Open a generation."""
        await asyncio.to_thread(self._held.get, key)

    async def search(
        self,
        key: GenerationKey,
        descriptors: NDArray[np.float32],
        k: int,
        filters: Filters | None,
        left_s: float,
    ) -> Found | None:
        """See `LocalShards.search_part`."""

        def work(deadline: Deadline) -> Found | None:
            opened, shards = self._held.get(key)
            conditions = None if filters is None else (filters, opened.map.places)
            return shards.search_part(descriptors, k, conditions, deadline)

        return await _in_thread(work, left_s)

    async def rescored(
        self, key: GenerationKey, descriptors: NDArray[np.float32], ids: NDArray[np.int64], left_s: float
    ) -> NDArray[np.float32]:
        """See `LocalShards.rescored_part`."""

        def work(deadline: Deadline) -> NDArray[np.float32]:
            return self._held.get(key)[1].rescored_part(descriptors, ids, deadline)

        return await _in_thread(work, left_s)


class RemoteNetwork:
    """The network in other replicas."""

    def __init__(self, handle: DeploymentHandle, opening: Opening) -> None:
        self._handle, self._config, self._weights_sha256 = handle, opening.config.model, opening.weights_sha256
        self._describes_what_it_scores = opening.first_stage.user_network is None

    @property
    def config(self) -> ModelConfig:
        """See `pairvpr.engines.Network`."""
        return self._config

    @property
    def weights_sha256(self) -> str:
        """See `pairvpr.engines.Network`."""
        return self._weights_sha256

    @property
    def describes_what_it_scores(self) -> bool:
        """See `pairvpr.engines.Network`."""
        return self._describes_what_it_scores

    def describe(self, photos: Sequence[Asked], deadline: Deadline) -> Described:
        """See `pairvpr.engines.Network`."""
        return _called(self._handle.describe, deadline, list(photos), deadline.left_s)

    def score(
        self,
        generation: Generation,
        photos: Sequence[Asked],
        embedded: Tensor | None,
        units: Sequence[WorkUnit],
        deadline: Deadline,
    ) -> Scored:
        """See `pairvpr.engines.Network`."""
        arguments = (generation.key, list(photos), embedded, list(units), deadline.left_s)
        return _called(self._handle.score, deadline, *arguments)

    def pair_score(self, photo: Asked, other: Asked, deadline: Deadline) -> float:
        """See `pairvpr.engines.Network`."""
        return _called(self._handle.pair_score, deadline, photo, other, deadline.left_s)

    def explained(self, photo: Asked, other: Asked, deadline: Deadline) -> Explained:
        """See `pairvpr.engines.Network`."""
        return _called(self._handle.explained, deadline, photo, other, deadline.left_s)


class RemoteShards:
    """The shards of a generation in other replicas, which have all opened it before a request asks for it."""

    def __init__(
        self,
        parts: Sequence[DeploymentHandle],
        network: DeploymentHandle,
        generation: Generation,
        search: SearchConfig,
    ) -> None:
        self._parts, self._manifest, self._key = parts, generation.manifest, generation.key
        self._effort = effort_of(generation.manifest, search)
        for handle in (*parts, network):
            _prepare(handle, generation)

    def search(
        self, descriptors: NDArray[np.float32], k: int, filters: tuple[Filters, Places] | None, deadline: Deadline
    ) -> Found:
        """See `pairvpr.engines.Shards`."""
        conditions = None if filters is None else filters[0]
        found = self._each("search", deadline, descriptors, k, conditions)
        best = merge_top_k(
            [each for each in found if each is not None], short_list_length(self._manifest, self._effort, k)
        )
        if not choose.KINDS[IndexKind(self._manifest.kind)].is_rescored:
            return best
        distances = np.minimum.reduce(self._each("rescored", deadline, descriptors, best[1]))
        return merge_top_k([(distances, best[1])], k)

    def _each(self, call: str, deadline: Deadline, *arguments: Any) -> list[Any]:
        """The answers of all parts."""
        asked = (self._key, *arguments, deadline.left_s)
        methods = [getattr(handle, call) for handle in self._parts]
        begun = [method.remote(*asked) for method in methods]
        return [
            _called(method, deadline, *asked, begun=response) for method, response in zip(methods, begun, strict=True)
        ]


def _is_there(handle: DeploymentHandle) -> bool:
    """Whether a replica of the deployment answers, and every one that is running."""
    try:
        return bool(handle.broadcast("is_there").results(timeout_s=READY_S))
    except (TimeoutError, RayError, RayServeException, RuntimeError):
        return False


def _prepare(handle: DeploymentHandle, generation: Generation) -> None:
    """Every replica opens a generation; waits for the first replica. Raises what opening it raises."""
    deadline = Deadline(PREPARED_S)
    while True:
        try:
            handle.broadcast("prepare", generation.key).results(timeout_s=deadline.left_s)
            return
        except RayTaskError as error:
            raise cast(BaseException, getattr(error, "cause", error)) from None
        except (RayError, RayServeException, RuntimeError) as error:  # no replica yet, or one that died meanwhile
            time.sleep(BETWEEN_TRIES_S)
            if deadline.left_s == 0.0:
                raise LostReplicaError("no replica opened the generation") from error


def _called(method: Any, deadline: Deadline, *arguments: Any, begun: Any = None) -> Any:
    """The result of a call, which another replica gets if one dies. Calls change nothing, so twice is as good as once.

    Raises what the call raises, `TooLateError` at the deadline, and `LostReplicaError`.
    """
    for attempt in range(TRIES):
        response = begun if begun is not None and attempt == 0 else method.remote(*arguments)
        try:
            return _waited(response, deadline)
        except (RayError, RayServeException) as error:
            if isinstance(error, RayTaskError):
                raise cast(BaseException, getattr(error, "cause", error)) from None
            time.sleep(min(BETWEEN_TRIES_S * 2**attempt, deadline.left_s))
            deadline.check()
    raise LostReplicaError("replicas were lost again and again")


def _waited(response: Any, deadline: Deadline) -> Any:
    """The result, or `TooLateError`; a call whose client is gone is cancelled."""
    while True:
        try:
            return response.result(timeout_s=min(LOOKED_EVERY_S, deadline.left_s))
        except RayTaskError:  # the call's own error, which may be a TimeoutError, too
            raise
        except TimeoutError as error:
            if deadline.left_s == 0.0:
                response.cancel()
                raise TooLateError("the time for this answer is over") from error
