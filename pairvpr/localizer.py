"""Locates photos in this process: an index is opened once, then queried. Needs neither Ray nor Hydra.

Answers equal those of the job `query` for a folder of the same photos, byte for byte (docs/localizer.md).

n photos, G descriptor width, L patches, D decoder width.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from numbers import Integral, Real
from threading import Lock
from typing import Any, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.config.benchmark_schema import PositionSource
from pairvpr.config.networks import named_network, network_names, network_of_settings
from pairvpr.config.schema import (
    BuildConfig,
    DenseFeatures,
    DescribeConfig,
    IndexKind,
    ModelConfig,
    PositionsConfig,
    Precision,
    RerankConfig,
    SearchConfig,
)
from pairvpr.data import claim, sealed, storage
from pairvpr.data.images import BrokenImageError
from pairvpr.data.local_cache import LocalCache, cache_directory
from pairvpr.data.manifest import Manifest, check_photos_are_seen
from pairvpr.data.photo_batches import PhotoBatch
from pairvpr.errors import PhotoError, UserError
from pairvpr.evaluation.confidence import (
    Calibration,
    Judge,
    calibrated,
    check_positions_of_votes,
    decision_of,
    unlike_the_network,
)
from pairvpr.evaluation.predictions import final_order, top_scores
from pairvpr.index.described import CHANGED, DescribedPhotos
from pairvpr.index.generations import IndexManifest, check_model, read_generation, read_images, read_manifest
from pairvpr.index.merge import Found
from pairvpr.index.reader import WarmIndex, search_index
from pairvpr.index.reduction import Reduction, read_reduction
from pairvpr.index.search import NO_ID, Effort
from pairvpr.models.class_attention import attention_grids
from pairvpr.models.weights import build_model, find_weights, load_weights
from pairvpr.photo import Asked, Photo, asked, is_many
from pairvpr.retrieval.decision import Decider
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.features import FeatureCache, PhotoFeatures
from pairvpr.retrieval.pipeline import Answer, answers, decided, feature_cache, load_pixels, no_pixels, with_prior
from pairvpr.retrieval.rerank import Features, Reranked, Reranker, WorkUnit, work_units
from pairvpr.retrieval.small_index import build_small_index
from pairvpr.retrieval.unreadable import Unreadable
from pairvpr.where import Map, Position, Utm, Where


@dataclass(frozen=True, slots=True)
class Match:
    """A photo of the index that may show the same place as the query photo."""

    path: str
    """Path relative to the folder of the index's photos."""
    url: str
    """Path or URL that can be opened."""
    database_id: int
    latitude: float | None
    """Degrees of WGS84; None if the photo's position or the index's UTM zone is unknown."""
    longitude: float | None
    utm: Utm | None
    """Metres in the index's UTM zone; None if the photo's position is unknown."""
    heading_deg: float | None
    """Viewing direction, clockwise from north; None if unknown."""
    squared_distance: float
    """Squared distance of the two global descriptors, which have unit length."""
    pair_score: float | None
    """Sum of both directions' logits, higher = more likely the same place; None from `retrieve`, which scores no pairs.

    Minus infinity if the index's photo is no longer readable or has changed since it was described.
    """
    confidence: float | None
    """Probability that the best match shows the place; None without a calibration.

    For the matches behind it: what they would have as the best one. None for them where `rerank.decision` is not pair.
    """


@dataclass(frozen=True)
class _Generation:
    """An open generation of the index."""

    manifest: IndexManifest
    photos: Manifest
    described: DescribedPhotos
    index: WarmIndex
    map: Map
    reduction: Reduction | None


@dataclass(frozen=True)
class _Described:
    """Readable query photos: their places (n,) in the request and descriptors (n, G); and the broken ones.

    `embedded` is the pair decoder's input for a single query photo.
    """

    places: NDArray[np.int64]
    descriptors: NDArray[np.float32]
    broken: Mapping[int, PhotoError]
    embedded: Tensor | None = None


class Localizer:
    """An open index and the network that made it. Threads may share it.

    `Localizer.open` opens an existing index; `Localizer.build` builds one from a small folder of photos.
    """

    def __init__(
        self,
        directory: str,
        manifest: IndexManifest,
        describers: tuple[Describer, Describer],
        sections: tuple[DescribeConfig, SearchConfig, RerankConfig],
        calibration: Calibration | None,
        budget_bytes: float,
        utm_epsg: int | None,
    ) -> None:
        self._directory = directory
        self._describer, self._pair_describer = describers
        self._describe, self._search, self._rerank = sections
        self._decision = None if calibration is None else decision_of(self._rerank, calibration)
        fitted = self._decision or calibration
        self._weights = None if self._decision is None else self._decision.weights
        self._judge = None if fitted is None else Judge(fitted.temperature, fitted.midpoint)
        self._stop_margin = fitted.stop_margin if fitted is not None and self._rerank.adaptive else None
        self._budget_bytes = budget_bytes
        self._utm_epsg = utm_epsg
        self._local_files = LocalCache(cache_directory(self._search.cache_dir), int(self._search.cache_gib * 2**30))
        self._features = feature_cache(self._rerank, self._describer.device)
        self._refreshing = Lock()
        self._now = self._opened(manifest)

    @classmethod
    def open(
        cls,
        index: str | os.PathLike[str],
        *,
        weights: str | os.PathLike[str] | None = None,
        model: str | ModelConfig | None = None,
        generation: int | None = None,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        calibration: str | os.PathLike[str] | None = None,
        memory_gib: float | None = None,
        utm_epsg: int | None = None,
        describe: DescribeConfig | None = None,
        search: SearchConfig | None = None,
        rerank: RerankConfig | None = None,
    ) -> Localizer:
        """Open an index directory (path or URL) for any number of queries.

        By default, `weights` (path or URL) are those published for the index's model, `model` (a name, or a network) is
        the one that made the index, `generation` is the newest, and `device` is a GPU if torch finds one. All
        shards stay in memory, unless `memory_gib` limits them; the others are then opened for each call. `utm_epsg` is
        the EPSG code of the UTM zone of the index's positions, if photo names do not give it. `describe`, `search` and
        `rerank` are sections of the settings of the job `query`, with the same defaults.

        Raises `UserError` if there is no index, if other weights made it, and for invalid settings.
        """
        sections = _own_network(describe), search or SearchConfig(), _settled(rerank, calibration)
        if memory_gib is not None and not (isinstance(memory_gib, Real) and 0 <= memory_gib < math.inf):
            raise UserError(f"memory_gib={memory_gib}: expected 0 or more, and finite")
        directory, on = storage.absolute(os.fspath(index)), _device(device)
        manifest = _manifest(directory, generation)
        judged_by = calibrated(sections[2])
        network = replace(_network(directory, manifest, model), precision=_precision(precision))
        if weights is not None:
            network = replace(network, weights=os.fspath(weights))
        found = find_weights(network)
        settings = network.settings() | {"weights_sha256": found.sha256}
        check_model(directory, manifest, name=network.name, weights_sha256=found.sha256, model=settings)
        if judged_by is not None:
            first_stage = unlike_the_network(file_width=None, reduced_to=manifest.reduced_to)
            judged_by.check(str(sections[2].calibration), settings, first_stage)
        built = build_model(network, load_weights(network, found), on)
        return cls(
            directory,
            manifest,
            (Describer(built, sections[0].num_threads_per_actor), Describer(built, sections[2].num_threads_per_actor)),
            sections,
            judged_by,
            math.inf if memory_gib is None else memory_gib * 2**30,
            utm_epsg,
        )

    @classmethod
    def build(
        cls,
        photos: str | os.PathLike[str],
        index: str | os.PathLike[str],
        *,
        model: str | ModelConfig,
        weights: str | os.PathLike[str] | None = None,
        positions: str | None = None,
        kind: str = "auto",
        device: str | torch.device | None = None,
        precision: str = "fp32",
        describe: DescribeConfig | None = None,
    ) -> Localizer:
        """Describe and index a small folder of photos (path or URL) in this process, and open the index.

        It is byte-identical to that of the job `build_index`, which is for large folders. `positions` is their source:
        names, exif, or a table (.csv, .parquet). A finished index is opened as it is.

        Raises `UserError` as that job does.
        """
        section, directory = _own_network(describe), storage.absolute(os.fspath(index))
        network = model if isinstance(model, ModelConfig) else named_network(model)
        network = replace(network, precision=_precision(precision))
        if weights is not None:
            network = replace(network, weights=os.fspath(weights))
        found = find_weights(network)
        built = build_model(network, load_weights(network, found), _device(device))
        with _torch_threads_kept():
            build_small_index(
                os.fspath(photos),
                directory,
                Describer(built, section.num_threads_per_actor),
                found.sha256,
                section,
                BuildConfig(kind=_kind(kind)),
                _positions(positions),
            )
        return cls.open(directory, model=network, device=device, precision=precision, describe=describe)

    @property
    def generation(self) -> int:
        """Number of the open generation of the index."""
        return self._now.manifest.generation

    @property
    def num_photos(self) -> int:
        """Number of photos that can be found."""
        return self._now.manifest.num_live

    def refresh(self) -> bool:
        """Switch to the newest generation of the index; returns whether it is a different one.

        Shards in both stay in memory. Running calls of other threads finish with the old generation.
        """
        with self._refreshing:
            manifest = _manifest(self._directory, None)
            if manifest.generation == self._now.manifest.generation:
                return False
            self._now = self._opened(manifest, self._now.index)
            return True

    @overload
    def locate(  # pyright: ignore[reportOverlappingOverload]  (a text is one photo)
        self,
        photos: Photo,
        *,
        k: int = 5,
        near: Position | None = None,
        radius_m: float | None = None,
        box: tuple[Position, Position] | None = None,
        heading_deg: float | None = None,
        within_deg: float | None = None,
    ) -> list[Match]: ...

    @overload
    def locate(
        self,
        photos: Sequence[Photo],
        *,
        k: int = 5,
        near: Position | Sequence[Position] | None = None,
        radius_m: float | None = None,
        box: tuple[Position, Position] | None = None,
        heading_deg: float | Sequence[float] | None = None,
        within_deg: float | None = None,
    ) -> list[list[Match] | PhotoError]: ...

    def locate(
        self,
        photos: Photo | Sequence[Photo],
        *,
        k: int = 5,
        near: Position | Sequence[Position] | None = None,
        radius_m: float | None = None,
        box: tuple[Position, Position] | None = None,
        heading_deg: float | Sequence[float] | None = None,
        within_deg: float | None = None,
    ) -> list[Match] | list[list[Match] | PhotoError]:
        """The k best matches of a photo, best first; for a sequence of photos, one list for each.

        The `rerank.num_candidates` nearest photos of the index are re-ranked. Conditions restrict the search to photos
        taken at most `radius_m` from `near`, inside `box` (south-west and north-east corner; sides follow the UTM grid)
        and with a heading at most `within_deg` from `heading_deg`. A position is (latitude, longitude) or `Utm`. For
        several photos, `near` and `heading_deg` are one for all, or one for each.

        Raises `PhotoError` for an unreadable photo; for a sequence, the error is returned in the photo's place.
        """
        if not isinstance(k, Integral) or not 0 < k <= self._rerank.num_candidates:
            raise UserError(f"k={k}: expected 1 to rerank.num_candidates={self._rerank.num_candidates}")
        where = Where(near=near, radius_m=radius_m, box=box, heading_deg=heading_deg, within_deg=within_deg)
        with _torch_threads_kept():
            answers = self._located(asked(photos), k, where)
        if is_many(photos):
            return answers
        if isinstance(answers[0], PhotoError):
            raise answers[0]
        return answers[0]

    def describe(self, photos: Photo | Sequence[Photo]) -> NDArray[np.float32]:
        """Global descriptors (n, G) of unit length; (1, G) of one photo. Raises `PhotoError` for a broken one."""
        with _torch_threads_kept():
            described = self._described(asked(photos))
        if described.broken:
            raise described.broken[min(described.broken)]
        return described.descriptors

    def retrieve(
        self,
        descriptors: NDArray[np.float32],
        *,
        k: int = 5,
        near: Position | Sequence[Position] | None = None,
        radius_m: float | None = None,
        box: tuple[Position, Position] | None = None,
        heading_deg: float | Sequence[float] | None = None,
        within_deg: float | None = None,
    ) -> list[list[Match]]:
        """The k nearest photos of each descriptor (n, G), nearest first, not re-ranked; conditions as in `locate`."""
        if not isinstance(k, Integral) or k < 1:
            raise UserError(f"k={k}: expected 1 or more")
        now, width = self._now, self._now.manifest.described_dim
        try:
            queries = np.asarray(descriptors, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"descriptors: expected numbers (n, {width}), not {type(descriptors).__name__}") from error
        if queries.ndim != 2 or queries.shape[1] != width or not np.isfinite(queries).all():
            raise UserError(f"descriptors of shape {queries.shape}: expected (n, {width}), all of them finite")
        where = Where(near=near, radius_m=radius_m, box=box, heading_deg=heading_deg, within_deg=within_deg)
        distances, ids = self._nearest(now, queries, np.arange(len(queries)), k, where, len(queries))
        return [self._matches(now, *_found(*row)) for row in zip(distances, ids, strict=True)]

    def score(self, photo: Photo, other: Photo) -> float:
        """Pair score of two photos: the sum of both directions' logits, higher = more likely the same place.

        Raises `PhotoError` for an unreadable photo.
        """
        pixels = [Asked(each).pixels(self._network) for each in (photo, other)]
        with _torch_threads_kept():
            first, second = (self._pair_describer.embedded(each) for each in pixels)
            (scored,) = self._reranker(_given(first), _given(second)).rerank(WorkUnit(0, {0: [0]}))
        return float(scored.pair_scores[0])

    @torch.inference_mode()
    def attention(self, photo: Photo, other: Photo) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Where the pair decoder looks in two photos: a square grid of patches of each, float32, each sums to 1.

        Weights of the class token's attention, mean over blocks, heads and both directions of the pair. The grid covers
        the whole photo. Raises `PhotoError` for an unreadable photo.
        """
        pixels = [Asked(each).pixels(self._network) for each in (photo, other)]
        with _torch_threads_kept():
            first, second = (self._pair_describer.embedded(each)[None] for each in pixels)
            return attention_grids(self._pair_describer.model, first, second)

    @property
    def _network(self) -> ModelConfig:
        return self._describer.model.config

    def _opened(self, manifest: IndexManifest, before: WarmIndex | None = None) -> _Generation:
        photos = read_images(self._directory, manifest)
        check_positions_of_votes(self._decision, photos.utm_m)
        index = WarmIndex(
            self._directory,
            manifest,
            self._local_files,
            budget_bytes=self._budget_bytes,
            memory_map=self._search.memory_map,
            has_gpu=self._search.num_gpus_per_actor > 0,
            before=before,
        )
        described = DescribedPhotos(self._directory, manifest, photos)
        reduction = read_reduction(self._directory, manifest)
        return _Generation(manifest, photos, described, index, Map(photos, self._utm_epsg), reduction)

    def _located(self, photos: Sequence[Asked], k: int, where: Where) -> list[list[Match] | PhotoError]:
        """The steps of the job `query`, with the same photos in each forward pass."""
        now, described = self._now, self._described(photos)
        num_kept = self._search.num_kept(self._rerank.num_candidates)
        rows = self._nearest(now, described.descriptors, described.places, num_kept, where, len(photos))
        found = {place: _found(*row) for place, *row in zip(described.places.tolist(), *rows, strict=True)}
        scored, broken = self._scored(now, photos, described.embedded, found)
        broken |= described.broken
        final = answers(len(photos), found, scored)
        if self._decision is not None:
            final = decided(final, Decider(self._decision, now.map.places.utm_m))
        return [broken.get(answer.query_id) or self._best(now, answer, k) for answer in final]

    def _best(self, now: _Generation, answer: Answer, k: int) -> list[Match]:
        """The k best matches of one photo."""
        best = final_order(answer)[:k]
        distance_of = dict(zip(answer.candidates.tolist(), answer.squared_distances, strict=True))
        score_of = dict(zip(answer.reranked.tolist(), answer.pair_scores, strict=True))
        distances, scores = (
            np.array([of[image_id] for image_id in best.tolist()], np.float32) for of in (distance_of, score_of)
        )
        confidence = None
        if self._judge is not None and answer.decided is None:
            confidence = self._judge.confidence(scores)
        elif self._judge is not None:
            confidence = np.full(len(best), np.nan, np.float32)
            confidence[:1] = self._judge.confidence(top_scores([answer]))
        return self._matches(now, best, distances, scores, confidence)

    def _described(self, photos: Sequence[Asked]) -> _Described:
        """Describe photos in batches, like a folder of them. A single photo needs one forward pass for everything."""
        if len(photos) == 1 and self._describe.num_threads_per_actor == self._rerank.num_threads_per_actor:
            try:
                descriptors, embedded = self._describer.both(photos[0].pixels(self._network))
            except PhotoError as error:
                return _Described(np.empty(0, np.int64), self._no_descriptors, {0: error})
            return _Described(np.zeros(1, np.int64), descriptors, {}, embedded)
        places, rows, broken = [np.empty(0, np.int64)], [self._no_descriptors], dict[int, PhotoError]()
        for first in range(0, len(photos), self._describe.batch_size):
            batch = self._batch(photos, first, broken)
            its_places, its_rows = batch.kept(self._describer.descriptors(batch.pixels))
            places.append(its_places)
            rows.append(its_rows)
        return _Described(np.concatenate(places), np.concatenate(rows), broken)

    def _batch(self, photos: Sequence[Asked], first: int, broken: dict[int, PhotoError]) -> PhotoBatch:
        """The photos of one forward pass, from place `first` on; unreadable ones are added to `broken`."""
        some = photos[first : first + self._describe.batch_size]
        side_px = self._network.image_size_px
        pixels, errors = np.zeros((len(some), side_px, side_px, 3), np.uint8), dict[int, str]()
        for position, photo in enumerate(some):
            try:
                pixels[position] = photo.pixels(self._network)
            except PhotoError as error:
                broken[first + position] = error
                errors[position] = error.reason
        return PhotoBatch(first, pixels, errors)

    @property
    def _no_descriptors(self) -> NDArray[np.float32]:
        return np.empty((0, self._network.descriptor_dim), np.float32)

    def _nearest(
        self,
        now: _Generation,
        descriptors: NDArray[np.float32],
        places: NDArray[np.int64],
        k: int,
        where: Where,
        num_asked: int,
    ) -> Found:
        """The k nearest for each descriptor (n, G); `places` (n,) are the photos' places in the request."""
        filters = now.map.filters(where, num_asked)
        if filters is not None:
            filters = filters[0].of_queries(places), filters[1]
        if now.reduction is not None:
            descriptors = now.reduction(descriptors)
        effort = now.index.effort
        if self._search.num_probes is not None:
            effort = Effort(self._search.num_probes, effort.num_rescored)
        num_threads = self._search.num_threads_per_actor
        return search_index(now.index, descriptors, k, num_threads=num_threads, effort=effort, filters=filters)

    def _scored(
        self,
        now: _Generation,
        photos: Sequence[Asked],
        embedded: Tensor | None,
        found: Mapping[int, tuple[NDArray[np.int64], NDArray[np.float32]]],
    ) -> tuple[dict[int, Reranked], dict[int, PhotoError]]:
        """Every photo's candidates by place, re-ranked, and the photos that can no longer be read.

        `embedded` is the features of a single photo, if they are known. A candidate that is unreadable, or has changed
        since it was described, affects no other candidate.
        """
        describer, network = self._pair_describer, self._network
        queries, database = Unreadable(), Unreadable()

        def read_again(place: int) -> NDArray[np.uint8]:
            try:
                return photos[place].pixels(network)
            except PhotoError as error:
                raise BrokenImageError(error.reason) from error

        def candidate(image_id: int) -> NDArray[np.uint8]:
            if len(now.described.changed(np.array([image_id]))):
                raise BrokenImageError(CHANGED)
            return load_pixels(now.photos, network, image_id)

        def features(
            load: Callable[[int], NDArray[np.uint8]], unreadable: Unreadable, cache: FeatureCache | None = None
        ) -> Features:
            return PhotoFeatures(
                unreadable.guarded(load, lambda: no_pixels(network)),
                describer.embedded,
                device=describer.device,
                num_threads=self._rerank.num_loading_threads,
                cache=cache,
                lost=unreadable.reasons,
            )

        reranker = self._reranker(
            features(read_again, queries) if embedded is None else _given(embedded),
            features(candidate, database, self._features),
            queries.reasons,
            database.reasons,
        )
        candidates = {place: ids[: self._rerank.num_candidates].tolist() for place, (ids, _) in found.items()}
        units = with_prior(work_units(candidates, self._rerank.queries_per_unit), found, self._weights)
        scored = {answer.query_id: answer for unit in units for answer in reranker.rerank(unit)}
        if database.reasons:
            check_photos_are_seen(now.photos)
        return scored, {place: PhotoError(photos[place].name, why) for place, why in queries.reasons.items()}

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
            stop_margin=self._stop_margin,
            weights=self._weights,
            lost_queries=lost_queries,
            lost_candidates=lost_candidates,
        )

    def _matches(
        self,
        now: _Generation,
        ids: NDArray[np.int64],
        squared_distances: NDArray[np.float32],
        scores: NDArray[np.float32] | None = None,
        confidence: NDArray[np.float32] | None = None,
    ) -> list[Match]:
        degrees, places = now.map.degrees(ids), now.map.places
        return [
            Match(
                path=now.photos.path(image_id),
                url=now.photos.url(image_id),
                database_id=image_id,
                latitude=_known(degrees[row, 0]),
                longitude=_known(degrees[row, 1]),
                utm=_utm(places.utm_m[image_id]),
                heading_deg=_known(places.heading_deg[image_id]),
                squared_distance=float(squared_distances[row]),
                pair_score=None if scores is None else float(scores[row]),
                confidence=None if confidence is None else _known(confidence[row]),
            )
            for row, image_id in enumerate(ids.tolist())
        ]


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Restores the calling thread's number of torch threads after the block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _given(embedded: Tensor) -> Features:
    """Known features of a single photo, whatever its id."""
    return lambda _: iter([embedded])


def _found(
    squared_distances: NDArray[np.float32], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and squared distances of a row of an answer, without its empty places."""
    is_there = ids != NO_ID
    return ids[is_there], squared_distances[is_there]


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _utm(position: NDArray[np.float64]) -> Utm | None:
    return None if np.isnan(position).any() else Utm(*position.tolist())


def _settled(rerank: RerankConfig | None, calibration: str | os.PathLike[str] | None) -> RerankConfig:
    settings = rerank or RerankConfig()
    if settings.num_candidates == 0:
        raise UserError(
            "rerank.num_candidates=0: a Localizer re-ranks; expected 1 or more, or retrieve(describe(photo))"
        )
    if settings.dense_features == DenseFeatures.store:
        raise UserError("rerank.dense_features=store: a Localizer can't use a store; expected cache or recompute")
    if settings.candidates is not None:
        raise UserError(f"rerank.candidates={settings.candidates}: a Localizer finds candidates itself; expected null")
    return settings if calibration is None else replace(settings, calibration=os.fspath(calibration))


def _own_network(describe: DescribeConfig | None) -> DescribeConfig:
    if describe is not None and describe.descriptors is not None:
        raise UserError(f"describe.descriptors={describe.descriptors}: a Localizer describes photos itself")
    return describe or DescribeConfig()


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={device}: {storage.reason(error)}; expected cpu, cuda or cuda:N") from error
    return chosen


def _kind(kind: str) -> IndexKind:
    if kind not in list(IndexKind):
        raise UserError(f"kind={kind}: expected one of {', '.join(IndexKind)}")
    return IndexKind(kind)


def _positions(positions: str | None) -> PositionsConfig:
    if positions is None or positions in (PositionSource.names, PositionSource.exif):
        return PositionsConfig(positions=None if positions is None else PositionSource(positions))
    if not positions.lower().endswith((".csv", ".parquet")):
        raise UserError(f"positions={positions}: expected names, exif, or a table (.csv or .parquet)")
    return PositionsConfig(positions=PositionSource.table, positions_table=positions)


def _precision(precision: str) -> Precision:
    if precision not in list(Precision):
        raise UserError(f"precision={precision}: expected one of {', '.join(Precision)}")
    return Precision(precision)


def _manifest(directory: str, generation: int | None) -> IndexManifest:
    newest = read_manifest(directory)
    if newest is None:
        raise UserError(f"index {directory}: no finished index there; expected a directory with manifest.json")
    is_number = isinstance(generation, int)
    manifest = read_generation(directory, generation) if is_number else newest if generation is None else None
    if manifest is None:
        raise UserError(
            f"generation={generation}: index {directory} has no such generation; expected 1 to {newest.generation}"
        )
    if not storage.exists(manifest.images_root):
        raise UserError(
            f"index {directory}: its photos were in {manifest.images_root}, which does not exist; expected them where "
            "they were when it was built, because re-ranking reads them again"
        )
    return manifest


def _network(directory: str, manifest: IndexManifest, model: str | ModelConfig | None) -> ModelConfig:
    """The network given by `model`, or described by the index's settings, with the weights published for its name."""
    if isinstance(model, ModelConfig):
        return model
    if model is not None:
        return named_network(model)
    name = manifest.model["name"]
    known = named_network(name) if name in network_names() else None
    settings = sealed.read_json(storage.join(directory, claim.FILE), "expected model=...")
    if settings is None:
        if known is not None:
            return known
        raise UserError(
            f"index {directory}: its {claim.FILE}, which describes the network {name}, is missing; expected model=... "
            f"(one of {', '.join(network_names())}, or a ModelConfig)"
        )
    try:
        return replace(network_of_settings(settings["model"]), weights=None if known is None else known.weights)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"index {directory}: its {claim.FILE} is not readable: {storage.reason(error)}") from error
