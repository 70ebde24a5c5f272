"""Both steps on one machine, in memory, without Ray: the reference that every distributed result must equal.

G descriptor width, L patches, D decoder width, S image side in pixels, K candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.config.schema import DenseFeatures, DescribeConfig, EvaluateConfig, ModelConfig, RerankConfig
from pairvpr.data import images
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.photo_batches import load_batch, load_photo, num_batches
from pairvpr.index.search import Shard, flat_index, search
from pairvpr.models.pair_vpr import PairVPR, sent
from pairvpr.retrieval.decision import Decided, Decider, Decision, Weights
from pairvpr.retrieval.dense_store import DTYPES, Layout, as_stored
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.features import FeatureCache, PhotoFeatures
from pairvpr.retrieval.rerank import Features, Reranked, Reranker, WorkUnit, work_units
from pairvpr.retrieval.unreadable import Unreadable
from pairvpr.retrieval.user_network import UserDescriber


@dataclass(frozen=True)
class Described:
    """Ids (n,) and global descriptors (n, G) of the readable photos, and why the others could not be read.

    `remarks` are warnings about readable photos, by id.
    """

    ids: NDArray[np.int64]
    descriptors: NDArray[np.float32]
    rejected: dict[int, str]
    remarks: dict[int, str]


@dataclass(frozen=True)
class Answer:
    """One query's result: `candidates` by `squared_distances`, and the first K of them `reranked`.

    All arrays are best first, and empty for a query photo that could not be read.
    """

    query_id: int
    candidates: NDArray[np.int64]
    squared_distances: NDArray[np.float32]
    reranked: NDArray[np.int64]
    pair_scores: NDArray[np.float32]
    decided: Decided | None = None
    """The order of rerank.decision=fused|consensus; None for `pair`."""


def run(
    benchmark: Benchmark,
    model: PairVPR,
    config: EvaluateConfig,
    stop_margin: float | None = None,
    decision: Decision | None = None,
    user_network: UserDescriber | None = None,
) -> list[Answer]:
    """Describe, retrieve and re-rank every query, in query order; with `stop_margin`, re-ranking may stop early.

    A `decision`, if given, orders the answers, and its evidence decides which pairs are scored. A `user_network`
    describes the photos in place of `model`.
    """
    torch.set_num_threads(config.describe.num_threads_per_actor)
    describer = Describer(model)
    database = describe(benchmark.database, user_network or describer, config.describe)
    queries = describe(benchmark.queries, user_network or describer, config.describe)

    num_kept = config.index.num_kept(config.rerank.num_candidates)
    shard = Shard(flat_index(database.descriptors), database.ids)
    distances, ids = search(shard, queries.descriptors, num_kept, num_threads=config.index.num_threads_per_actor)

    torch.set_num_threads(config.rerank.num_threads_per_actor)
    weights = None if decision is None else decision.weights
    reranker = photo_reranker(benchmark, describer, config.rerank, stop_margin=stop_margin, weights=weights)
    found = {int(query_id): (ids[row], distances[row]) for row, query_id in enumerate(queries.ids)}
    candidates = {query_id: its[: config.rerank.num_candidates].tolist() for query_id, (its, _) in found.items()}
    units = with_prior(work_units(candidates, config.rerank.queries_per_unit), found, weights)
    reranked = {answer.query_id: answer for unit in units for answer in reranker.rerank(unit)}
    final = answers(len(benchmark.queries), found, reranked)
    return final if decision is None else decided(final, Decider(decision, benchmark.database.utm_m))


def describe(manifest: Manifest, describer: Describer | UserDescriber, config: DescribeConfig) -> Described:
    """Global descriptors of all photos of a manifest, batch by batch."""
    ids, rows, rejected, remarks = list[NDArray[np.int64]](), list[NDArray[np.float32]](), {}, {}
    for number in range(num_batches(len(manifest), config.batch_size)):
        batch = load_batch(manifest, number, config.batch_size, describer.photos)
        batch_ids, batch_rows = batch.kept(describer.descriptors(batch.pixels))
        ids.append(batch_ids)
        rows.append(batch_rows)
        rejected |= batch.rejected
        remarks |= batch.remarked
    return Described(np.concatenate(ids), np.concatenate(rows), rejected, remarks)


def photo_reranker(
    benchmark: Benchmark,
    describer: Describer,
    settings: RerankConfig,
    stored: Callable[[int], Tensor] | None = None,
    stop_margin: float | None = None,
    changed: Mapping[int, str] | None = None,
    weights: Weights | None = None,
) -> Reranker:
    """A re-ranker that describes the benchmark's photos when it needs them.

    Photos that can't be read are added to its `lost_queries` and `lost_candidates`. Database photos that have `changed`
    since they were described (a reason by id) count as lost, too.

    `stored` reads a database photo's features (L, D) from a store; without it, a run with
    rerank.dense_features=store rounds them as the store would. `stop_margin` is the threshold of rerank.adaptive;
    `weights` are the weights of the evidence, if it is more than the pair score.
    """
    device, num_threads = describer.device, settings.num_loading_threads
    queries, database = Unreadable(), Unreadable(changed)
    network = describer.model.config

    def described(photos: Manifest, unreadable: Unreadable, cache: FeatureCache | None = None) -> Features:
        def embedded(pixels: NDArray[np.uint8]) -> Tensor:
            features = describer.embedded(pixels)
            return as_stored(features, settings.stored_as) if is_rounded else features

        is_rounded = photos is benchmark.database and settings.dense_features is DenseFeatures.store
        load = unreadable.guarded(partial(load_pixels, photos, network), lambda: no_pixels(network))
        return PhotoFeatures(
            load, embedded, device=device, num_threads=num_threads, cache=cache, lost=unreadable.reasons
        )

    return Reranker(
        describer.model,
        batch_size=settings.batch_size,
        query_features=described(benchmark.queries, queries),
        database_features=described(benchmark.database, database, feature_cache(settings, device))
        if stored is None
        else _stored_features(database.guarded(stored, partial(_no_features, network, settings)), device, num_threads),
        second_direction=settings.second_direction,
        queries_per_unit=settings.queries_per_unit,
        stop_margin=stop_margin,
        weights=weights,
        lost_queries=queries.reasons,
        lost_candidates=database.reasons,
    )


def _stored_features(read: Callable[[int], Tensor], device: torch.device, num_threads: int) -> Features:
    """Features (L, D) that `read` takes from a store, on the device."""

    def pinned(image_id: int) -> Tensor:
        """In a loading thread, so that `sent` finds it pinned."""
        features = read(image_id)
        return features if device.type == "cpu" else features.pin_memory()

    return PhotoFeatures(pinned, partial(sent, device=device), device=device, num_threads=num_threads)


def _no_features(network: ModelConfig, settings: RerankConfig) -> Tensor:
    """Placeholder features (L, D) of a store for a photo that can't be read."""
    layout = Layout.of_model(network, settings.stored_as)
    return torch.zeros(layout.num_patches, layout.width, dtype=DTYPES[layout.features])


def no_pixels(model: ModelConfig) -> NDArray[np.uint8]:
    """Placeholder pixels (S, S, 3) for a photo that can't be read."""
    return np.zeros((model.image_size_px, model.image_size_px, 3), np.uint8)


def load_pixels(photos: Manifest, model: ModelConfig, image_id: int) -> NDArray[np.uint8]:
    """A photo (S, S, 3) uint8 as the network sees it. Raises `BrokenImageError`, which names it."""
    url = photos.url(image_id)
    try:
        return load_photo(url, model).rgb
    except images.BrokenImageError as error:
        raise images.BrokenImageError(f"{url}: {error}") from error


def feature_cache(settings: RerankConfig, device: torch.device) -> FeatureCache | None:
    """The cache that a process keeps between units; with a GPU, first in its memory, then in host memory."""
    if settings.dense_features is not DenseFeatures.cache:
        return None
    in_memory = FeatureCache(int(settings.cache_gib * 2**30))
    return in_memory if device.type == "cpu" else FeatureCache(int(settings.gpu_cache_gib * 2**30), behind=in_memory)


def answers(
    num_queries: int,
    found: Mapping[int, tuple[NDArray[np.int64], NDArray[np.float32]]],
    reranked: Mapping[int, Reranked],
) -> list[Answer]:
    """One answer per query; `found` has ids and squared distances for the readable ones, best first."""
    nothing = np.empty(0, np.int64), np.empty(0, np.float32)
    answered = []
    for query_id in range(num_queries):
        ids, distances = found.get(query_id, nothing)
        scored = reranked.get(query_id, Reranked(query_id, *nothing))
        answered.append(Answer(query_id, ids, distances, scored.ids, scored.pair_scores))
    return answered


def with_prior(
    units: Sequence[WorkUnit],
    found: Mapping[int, tuple[NDArray[np.int64], NDArray[np.float32]]],
    weights: Weights | None,
) -> list[WorkUnit]:
    """The units with the prior evidence of each candidate; `found` is as in `answers`."""
    if weights is None:
        return list(units)
    return [
        replace(
            unit,
            prior={
                query_id: weights.prior(found[query_id][1][: len(ids)]) for query_id, ids in unit.candidates.items()
            },
        )
        for unit in units
    ]


def decided(answered: Sequence[Answer], decider: Decider) -> list[Answer]:
    """The answers in the decider's order."""
    return [
        replace(
            answer,
            decided=decider.decide(answer.candidates, answer.squared_distances, answer.reranked, answer.pair_scores),
        )
        for answer in answered
    ]
