"""What a Localizer is made of: a network that describes photos and scores pairs, and the shards that are searched.

Both are interfaces. Here are those of this process; `pairvpr.distributed.serve` has those of other processes, which
call these. The photos in a forward pass are the same everywhere, and so are the bytes.

n photos, G descriptor width, L patches, D decoder width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.config.schema import DescribePassConfig, ModelConfig, RerankConfig, SearchConfig
from pairvpr.data.images import BrokenImageError
from pairvpr.data.local_cache import LocalCache
from pairvpr.data.manifest import check_photos_are_seen
from pairvpr.data.photo_batches import PhotoBatch
from pairvpr.deadline import Deadline
from pairvpr.errors import PhotoError
from pairvpr.index.described import CHANGED
from pairvpr.index.filters import Filters, Places
from pairvpr.index.generations import IndexManifest
from pairvpr.index.merge import Found
from pairvpr.index.reader import WarmIndex, rescored_in_groups, search_groups, search_index
from pairvpr.index.search import Effort
from pairvpr.models.class_attention import attention_grids
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.opened import Generation
from pairvpr.photo import Asked
from pairvpr.retrieval.decision import Weights
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.features import FeatureCache, FeaturesOf, PhotoFeatures
from pairvpr.retrieval.first_stage import UserNetwork
from pairvpr.retrieval.pipeline import feature_cache, load_pixels, no_pixels
from pairvpr.retrieval.rerank import Features, Reranked, Reranker, WorkUnit
from pairvpr.retrieval.unreadable import Unreadable
from pairvpr.retrieval.user_network import UserDescriber


@dataclass(frozen=True)
class Described:
    """Readable query photos: their places (n,) in the request and descriptors (n, G); and the broken ones.

    `embedded` is the pair decoder's input (L, D) for a single query photo.
    """

    places: NDArray[np.int64]
    descriptors: NDArray[np.float32]
    broken: Mapping[int, PhotoError]
    embedded: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """Every photo's candidates by place, re-ranked; and the photos that can no longer be read."""

    by_place: Mapping[int, Reranked]
    broken: Mapping[int, PhotoError]


@dataclass(frozen=True)
class Explained:
    """Two photos seen together, and where the pair decoder looks in each: square grids of patches, float32, sum 1."""

    pair_score: float
    over_photo: NDArray[np.float32]
    over_other: NDArray[np.float32]


class Network(Protocol):
    """Describes photos and scores pairs. All calls raise `TooLateError` after the deadline."""

    @property
    def config(self) -> ModelConfig:
        """Its shape."""
        ...

    @property
    def weights_sha256(self) -> str:
        """Of the weights that score pairs."""
        ...

    @property
    def describes_what_it_scores(self) -> bool:
        """Whether describing and scoring take the same pixels: not where a network of the user's describes."""
        ...

    def describe(self, photos: Sequence[Asked], deadline: Deadline) -> Described:
        """Global descriptors of photos, in batches like a folder of them."""
        ...

    def score(
        self,
        generation: Generation,
        photos: Sequence[Asked],
        embedded: Tensor | None,
        units: Sequence[WorkUnit],
        deadline: Deadline,
    ) -> Scored:
        """Pair scores of photos with candidates of a generation; `embedded` is that of a single photo, if known."""
        ...

    def pair_score(self, photo: Asked, other: Asked, deadline: Deadline) -> float:
        """The score of two photos, both directions."""
        ...

    def explained(self, photo: Asked, other: Asked, deadline: Deadline) -> Explained:
        """The score of two photos, and where it looks in them."""
        ...


class Shards(Protocol):
    """The shards of one generation."""

    def search(
        self, descriptors: NDArray[np.float32], k: int, filters: tuple[Filters, Places] | None, deadline: Deadline
    ) -> Found:
        """The k nearest photos of descriptors (n, G) as they are in the index, among those that `filters` allow."""
        ...


class LocalNetwork:
    """The network in this process. Threads may share it: each call computes in the thread that makes it.

    `weights_sha256` belongs to `model`. Of `describe` and `rerank`, only what decides about forward passes is read.
    `weights` and `stop_margin` are as in `Reranker`. A `user_network` describes photos in place of `model`, which then
    scores pairs alone.
    """

    def __init__(
        self,
        model: PairVPR,
        weights_sha256: str,
        describe: DescribePassConfig,
        rerank: RerankConfig,
        weights: Weights | None = None,
        stop_margin: float | None = None,
        user_network: UserNetwork | None = None,
    ) -> None:
        self._describer: Describer | UserDescriber = Describer(model, describe.num_threads_per_actor)
        if user_network is not None:
            device = self._describer.device
            self._describer = UserDescriber.built(user_network, device, describe.num_threads_per_actor)
        self._pair_describer = Describer(model, rerank.num_threads_per_actor)
        self._describe, self._rerank, self._weights_sha256 = describe, rerank, weights_sha256
        self._weights, self._stop_margin = weights, stop_margin
        self._features = feature_cache(rerank, self._pair_describer.device)

    @property
    def config(self) -> ModelConfig:
        """See `Network.config`."""
        return self._pair_describer.model.config

    @property
    def weights_sha256(self) -> str:
        """See `Network.weights_sha256`."""
        return self._weights_sha256

    @property
    def cached_bytes(self) -> int:
        """Memory that features of candidates take."""
        return 0 if self._features is None else self._features.used_bytes

    @property
    def describes_what_it_scores(self) -> bool:
        """See `Network.describes_what_it_scores`."""
        return isinstance(self._describer, Describer)

    def describe(self, photos: Sequence[Asked], deadline: Deadline) -> Described:
        """See `Network.describe`. A single photo needs one forward pass of Pair-VPR's own network for everything."""
        own = self._describer if isinstance(self._describer, Describer) else None
        with torch_threads(self._describe.num_threads_per_actor):
            if own and len(photos) == 1 and self._describe.num_threads_per_actor == self._rerank.num_threads_per_actor:
                return self._described_alone(own, photos[0], deadline)
            places, rows, broken = [np.empty(0, np.int64)], [self._no_descriptors], dict[int, PhotoError]()
            for first in range(0, len(photos), self._describe.batch_size):
                batch = self._batch(photos, first, broken)
                deadline.check()
                its_places, its_rows = batch.kept(self._describer.descriptors(batch.pixels))
                places.append(its_places)
                rows.append(its_rows)
        return Described(np.concatenate(places), np.concatenate(rows), broken)

    def _described_alone(self, own: Describer, photo: Asked, deadline: Deadline) -> Described:
        try:
            pixels = photo.pixels(self.config)
        except PhotoError as error:
            return Described(np.empty(0, np.int64), self._no_descriptors, {0: error})
        deadline.check()
        descriptors, embedded = own.both(pixels)
        return Described(np.zeros(1, np.int64), descriptors, {}, embedded)

    def _batch(self, photos: Sequence[Asked], first: int, broken: dict[int, PhotoError]) -> PhotoBatch:
        """The photos of one forward pass, from place `first` on; unreadable ones are added to `broken`."""
        some, settings = photos[first : first + self._describe.batch_size], self._describer.photos
        side_px = settings.image_size_px
        pixels, errors = np.zeros((len(some), side_px, side_px, 3), np.uint8), dict[int, str]()
        for position, photo in enumerate(some):
            try:
                pixels[position] = photo.pixels(settings)
            except PhotoError as error:
                broken[first + position] = error
                errors[position] = error.reason
        return PhotoBatch(first, pixels, errors)

    @property
    def _no_descriptors(self) -> NDArray[np.float32]:
        return np.empty((0, self._describer.width), np.float32)

    def score(
        self,
        generation: Generation,
        photos: Sequence[Asked],
        embedded: Tensor | None,
        units: Sequence[WorkUnit],
        deadline: Deadline,
    ) -> Scored:
        """See `Network.score`.

        A candidate that is unreadable, or has changed since it was described, affects no other candidate.
        """
        queries, database = Unreadable(), Unreadable()

        def read_again(place: int) -> NDArray[np.uint8]:
            try:
                return photos[place].pixels(self.config)
            except PhotoError as error:
                raise BrokenImageError(error.reason) from error

        def candidate(image_id: int) -> NDArray[np.uint8]:
            if len(generation.described.changed(np.array([image_id]))):
                raise BrokenImageError(CHANGED)
            return load_pixels(generation.photos, self.config, image_id)

        cache = None if self._features is None else FeaturesOf(generation.directory, self._features)
        reranker = self._reranker(
            self._read(read_again, queries) if embedded is None else _given(embedded.to(self._pair_describer.device)),
            _until(deadline, self._read(candidate, database, cache)),
            queries.reasons,
            database.reasons,
        )
        with torch_threads(self._rerank.num_threads_per_actor):
            scored = {answer.query_id: answer for unit in units for answer in reranker.rerank(unit)}
        if database.reasons:
            check_photos_are_seen(generation.photos)
        return Scored(scored, {place: PhotoError(photos[place].name, why) for place, why in queries.reasons.items()})

    def _read(
        self,
        load: Callable[[int], NDArray[np.uint8]],
        unreadable: Unreadable,
        cache: FeatureCache | FeaturesOf | None = None,
    ) -> Features:
        """The features of photos that `load` reads."""
        return PhotoFeatures(
            unreadable.guarded(load, lambda: no_pixels(self.config)),
            self._pair_describer.embedded,
            device=self._pair_describer.device,
            num_threads=self._rerank.num_loading_threads,
            cache=cache,
            lost=unreadable.reasons,
        )

    def pair_score(self, photo: Asked, other: Asked, deadline: Deadline) -> float:
        """See `Network.pair_score`."""
        with torch_threads(self._rerank.num_threads_per_actor):
            return self._score_of(*self._embedded_pair(photo, other, deadline))

    @torch.inference_mode()
    def explained(self, photo: Asked, other: Asked, deadline: Deadline) -> Explained:
        """See `Network.explained`."""
        with torch_threads(self._rerank.num_threads_per_actor):
            first, second = self._embedded_pair(photo, other, deadline)
            grids = attention_grids(self._pair_describer.model, first[None], second[None])
            deadline.check()
            return Explained(self._score_of(first, second), *grids)

    def _embedded_pair(self, photo: Asked, other: Asked, deadline: Deadline) -> tuple[Tensor, Tensor]:
        """The dense features of two photos; both are decoded before the network sees one."""
        embedded = []
        for pixels in [each.pixels(self.config) for each in (photo, other)]:
            deadline.check()
            embedded.append(self._pair_describer.embedded(pixels))
        deadline.check()
        return embedded[0], embedded[1]

    def _score_of(self, first: Tensor, second: Tensor) -> float:
        (scored,) = self._reranker(_given(first), _given(second)).rerank(WorkUnit(0, {0: [0]}))
        return float(scored.pair_scores[0])

    def _reranker(
        self,
        queries: Features,
        database: Features,
        lost_queries: Mapping[int, str] | None = None,
        lost_candidates: Mapping[int, str] | None = None,
    ) -> Reranker:
        return Reranker(
            self._pair_describer.model,
            batch_size=self._rerank.batch_size,
            query_features=queries,
            database_features=database,
            second_direction=self._rerank.second_direction,
            queries_per_unit=self._rerank.queries_per_unit,
            stop_margin=self._stop_margin,
            weights=self._weights,
            lost_queries=lost_queries,
            lost_candidates=lost_candidates,
        )


class LocalShards:
    """The shards of a generation in this process, of which `budget_bytes` stay in memory.

    `files` keeps local copies of remote ones. Shards of an earlier generation `before` are shared. These are all,
    or one of several parts. Threads may share them.
    """

    def __init__(
        self,
        generation: Generation,
        search: SearchConfig,
        files: LocalCache,
        budget_bytes: float = math.inf,
        before: LocalShards | None = None,
        part: int = 0,
        num_parts: int = 1,
    ) -> None:
        self._search = search
        self._index = WarmIndex(
            generation.directory,
            generation.manifest,
            files,
            budget_bytes=budget_bytes,
            memory_map=search.memory_map,
            has_gpu=search.num_gpus_per_actor > 0,
            before=None if before is None else before._index,
            part=part,
            num_parts=num_parts,
        )

    def search(
        self, descriptors: NDArray[np.float32], k: int, filters: tuple[Filters, Places] | None, deadline: Deadline
    ) -> Found:
        """See `Shards.search`."""
        deadline.check()
        num_threads, effort = self._search.num_threads_per_actor, effort_of(self._index.manifest, self._search)
        return search_index(self._index, descriptors, k, num_threads=num_threads, effort=effort, filters=filters)

    def search_part(
        self, descriptors: NDArray[np.float32], k: int, filters: tuple[Filters, Places] | None, deadline: Deadline
    ) -> Found | None:
        """What this part finds, before exact distances are computed; None if it has no shard."""
        deadline.check()
        num_threads, effort = self._search.num_threads_per_actor, effort_of(self._index.manifest, self._search)
        groups = self._index.groups
        return search_groups(
            self._index, groups, descriptors, k, num_threads=num_threads, effort=effort, filters=filters
        )

    def rescored_part(
        self, descriptors: NDArray[np.float32], ids: NDArray[np.int64], deadline: Deadline
    ) -> NDArray[np.float32]:
        """Exact squared distances of what is in this part; infinite for the rest."""
        deadline.check()
        num_threads = self._search.num_threads_per_actor
        return rescored_in_groups(self._index, self._index.groups, descriptors, ids, num_threads=num_threads)


def effort_of(manifest: IndexManifest, search: SearchConfig) -> Effort:
    """The index's effort, or that of the settings."""
    effort = Effort(**manifest.effort)
    return effort if search.num_probes is None else Effort(search.num_probes, effort.num_rescored)


@contextmanager
def torch_threads(num_threads: int) -> Iterator[None]:
    """torch uses `num_threads` inside the block; after it, the calling thread has the number that it had before."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _given(embedded: Tensor) -> Features:
    """Known features of a single photo, whatever its id."""
    return lambda _: iter([embedded])


def _until(deadline: Deadline, features: Features) -> Features:
    """The same features; between two of them, `TooLateError` after the deadline."""

    def checked(image_ids: Sequence[int]) -> Iterator[Tensor]:
        for each in features(image_ids):
            deadline.check()
            yield each

    return checked
