"""Locates photos in this process: an index is opened once, then queried. Needs neither Ray nor Hydra.

Answers equal those of the job `query` for a folder of the same photos, byte for byte (docs/localizer.md).

n photos, G descriptor width, L patches, D decoder width.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from threading import Lock
from typing import TypeAlias, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray

from pairvpr.config.benchmark_schema import PositionSource
from pairvpr.config.networks import named_network
from pairvpr.config.schema import (
    BuildConfig,
    DecisionRule,
    DenseFeatures,
    DescribeConfig,
    DescriptorConfig,
    IndexKind,
    ModelConfig,
    PositionsConfig,
    Precision,
    RerankConfig,
    SearchConfig,
)
from pairvpr.data import storage
from pairvpr.data.local_cache import LocalCache, cache_directory
from pairvpr.deadline import Deadline
from pairvpr.engines import Described, Explained, LocalNetwork, LocalShards, Network, Shards, torch_threads
from pairvpr.errors import PhotoError, UserError
from pairvpr.evaluation.confidence import Rules, calibrated, check_positions_of_votes, unlike_the_network
from pairvpr.index.filters import Filters, Places
from pairvpr.index.merge import Found
from pairvpr.index.search import NO_ID
from pairvpr.located import Located, Match, Seconds, located, matches_of
from pairvpr.models.weights import build_model, find_weights, load_weights
from pairvpr.opened import Generation, check_same_index, manifest_of, network_of
from pairvpr.photo import Asked, Photo, asked, is_many
from pairvpr.retrieval.decision import Decider
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.first_stage import FirstStage
from pairvpr.retrieval.pipeline import answers, decided, with_prior
from pairvpr.retrieval.rerank import work_units
from pairvpr.retrieval.small_index import build_small_index
from pairvpr.retrieval.user_network import UserDescriber, first_stage_of
from pairvpr.where import ANYWHERE, Position, Where

SectionConfig = TypeVar("SectionConfig", DescribeConfig, DescriptorConfig, SearchConfig, RerankConfig)
OpenShards: TypeAlias = Callable[[Generation, "Shards | None"], Shards]
"""Opens the shards of a generation; those of an earlier one may be shared."""


@dataclass(frozen=True)
class _Now:
    """The open generation and its shards."""

    generation: Generation
    shards: Shards


class Localizer:
    """An open index and the network that made it. Threads may share it.

    `Localizer.open` opens an existing index; `Localizer.build` builds one from a small folder of photos.
    """

    def __init__(
        self,
        generation: Generation,
        network: Network,
        open_shards: OpenShards,
        search: SearchConfig,
        rerank: RerankConfig,
        rules: Rules,
        utm_epsg: int | None = None,
    ) -> None:
        """Of parts that may be elsewhere; `Localizer.open` makes them in this process."""
        self._network, self._open_shards = network, open_shards
        self._search, self._rerank, self._rules = search, rerank, rules
        self._utm_epsg = utm_epsg
        self._refreshing = Lock()
        self._now = self._opened(generation)

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
        descriptor: DescriptorConfig | None = None,
    ) -> Localizer:
        """Open an index directory (path or URL) for any number of queries.

        By default, `weights` (path or URL) are those published for the index's model, `model` (a name, or a network) is
        the one that made the index, `generation` is the newest, and `device` is a GPU if torch finds one. All
        shards stay in memory, unless `memory_gib` limits them; the others are then opened for each call. `utm_epsg` is
        the EPSG code of the UTM zone of the index's positions, if photo names do not give it. `describe`, `search`,
        `rerank` and `descriptor` are sections of the settings of the job `query`, with the same defaults. With
        `descriptor.module`, that network describes photos, and `model` scores pairs alone.

        Raises `UserError` if there is no index, if other weights made it, and for invalid settings.
        """
        sections = _own_network(describe), _section("search", search, SearchConfig), _settled(rerank, calibration)
        if memory_gib is not None and not (isinstance(memory_gib, Real) and 0 <= memory_gib < math.inf):
            raise UserError(f"memory_gib={memory_gib}: expected 0 or more, and finite")
        directory, on = storage.absolute(_path("index", index)), _device(device)
        manifest = manifest_of(directory, generation)
        judged_by = calibrated(sections[2])
        network = replace(network_of(directory, manifest, model), precision=_precision(precision))
        if weights is not None:
            network = replace(network, weights=_path("weights", weights))
        found = find_weights(network)
        first = _first_stage(network, found.sha256, sections[0], descriptor)
        first.check_made(directory, manifest)
        if judged_by is not None:
            settings = network.settings() | {"weights_sha256": found.sha256}
            first_stage = unlike_the_network(first.settings, manifest.reduced_to)
            judged_by.check(str(sections[2].calibration), settings, first_stage)
        rules = Rules.of(sections[2], judged_by)
        built = build_model(network, load_weights(network, found), on)
        return cls(
            Generation.open(directory, manifest, utm_epsg),
            LocalNetwork(
                built, found.sha256, sections[0], sections[2], rules.weights, rules.stop_margin, first.user_network
            ),
            local_shards(sections[1], math.inf if memory_gib is None else memory_gib * 2**30),
            sections[1],
            sections[2],
            rules,
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
        descriptor: DescriptorConfig | None = None,
    ) -> Localizer:
        """Describe and index a small folder of photos (path or URL) in this process, and open the index.

        It is byte-identical to that of the job `build_index`, which is for large folders. `positions` is their source:
        names, exif, or a table (.csv, .parquet). A finished index is opened as it is. `descriptor` is as in `open`.

        Raises `UserError` as that job does.
        """
        section, directory = _own_network(describe), storage.absolute(_path("index", index))
        network = model if isinstance(model, ModelConfig) else named_network(model)
        network = replace(network, precision=_precision(precision))
        if weights is not None:
            network = replace(network, weights=_path("weights", weights))
        found = find_weights(network)
        first = _first_stage(network, found.sha256, section, descriptor)
        on = _device(device)
        if first.user_network is None:
            describer = Describer(build_model(network, load_weights(network, found), on), section.num_threads_per_actor)
        else:
            describer = UserDescriber.built(first.user_network, on, section.num_threads_per_actor)
        with torch_threads(section.num_threads_per_actor):
            build_small_index(
                _path("photos", photos),
                directory,
                describer,
                first,
                section,
                BuildConfig(kind=_kind(kind)),
                _positions(positions),
            )
        return cls.open(
            directory, model=network, device=device, precision=precision, describe=describe, descriptor=descriptor
        )

    @property
    def generation(self) -> int:
        """Number of the open generation of the index."""
        return self._now.generation.number

    @property
    def opened(self) -> Generation:
        """The open generation of the index."""
        return self._now.generation

    @property
    def network(self) -> ModelConfig:
        """The shape of the network."""
        return self._network.config

    @property
    def weights_sha256(self) -> str:
        """Of the weights that score pairs."""
        return self._network.weights_sha256

    @property
    def is_calibrated(self) -> bool:
        """Whether answers have a confidence."""
        return self._rules.judge is not None

    @property
    def decision(self) -> DecisionRule:
        """What orders the matches."""
        return self._rerank.decision

    @property
    def num_photos(self) -> int:
        """Number of photos that can be found."""
        return self._now.generation.manifest.num_live

    def refresh(self, generation: int | None = None) -> bool:
        """Switch to a generation of the index (None = the newest); returns whether it is a different one.

        Shards in both stay in memory. Running calls of other threads finish with the one that they began with.
        Raises `UserError` for an index that was built anew in the same place, and stays with what is open.
        """
        with self._refreshing:
            before = self._now
            manifest = manifest_of(before.generation.directory, generation)
            check_same_index(before.generation.directory, before.generation.manifest, manifest)
            if manifest.generation == before.generation.number:
                return False
            opened = Generation.open(before.generation.directory, manifest, self._utm_epsg)
            self._now = self._opened(opened, before.shards)
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
        taken at most `radius_m` from `near`, inside `box` (south-west and north-east corner) and with a heading at most
        `within_deg` from `heading_deg`. A position is (latitude, longitude) or `Utm`. A box in degrees becomes the
        smallest one along the UTM grid that holds it. For several photos, `near` and `heading_deg` are one for all, or
        one for each.

        Raises `PhotoError` for an unreadable photo; for a sequence, the error is returned in the photo's place.
        """
        where = Where(near=near, radius_m=radius_m, box=box, heading_deg=heading_deg, within_deg=within_deg)
        answers = self._located(asked(photos), self._numbers(k, None), where, Deadline())
        matches = [each if isinstance(each, PhotoError) else each.matches for each in answers]
        if is_many(photos):
            return matches
        if isinstance(matches[0], PhotoError):
            raise matches[0]
        return matches[0]

    def answer(
        self,
        photo: Photo,
        *,
        k: int = 5,
        num_candidates: int | None = None,
        where: Where = ANYWHERE,
        deadline: Deadline | None = None,
    ) -> Located:
        """All that is known of one photo: what `locate` finds, what the matches say together, and how long it took.

        `num_candidates` photos are re-ranked (None = `rerank.num_candidates`, which is also the most).
        Raises `PhotoError` for an unreadable photo, and `TooLateError` after the deadline, between two forward passes.
        """
        return answer_together([self], photo, k=k, num_candidates=num_candidates, where=where, deadline=deadline)[0]

    def check(self, *, k: int = 5, num_candidates: int | None = None, where: Where = ANYWHERE) -> None:
        """Raise the `UserError` that `answer` would raise for these conditions, whatever the photo."""
        self._numbers(k, num_candidates)
        self._now.generation.map.filters(where, 1)

    def _numbers(self, k: int, num_candidates: int | None) -> tuple[int, int]:
        """How many photos to return, and how many to re-rank."""
        most = self._rerank.num_candidates
        if num_candidates is None:
            num_candidates = most
        elif not isinstance(num_candidates, Integral) or not 0 < num_candidates <= most:
            raise UserError(f"num_candidates={num_candidates}: expected 1 to rerank.num_candidates={most}")
        elif self._rules.decision is not None and num_candidates != most:
            raise UserError(
                f"num_candidates={num_candidates}: rerank.decision={self._rerank.decision} was fitted to {most} "
                "candidates; expected that number"
            )
        if not isinstance(k, Integral) or not 0 < k <= num_candidates:
            name = "rerank.num_candidates" if num_candidates == most else "num_candidates"
            raise UserError(f"k={k}: expected 1 to {name}={num_candidates}")
        return k, num_candidates

    def describe(self, photos: Photo | Sequence[Photo]) -> NDArray[np.float32]:
        """Global descriptors (n, G) of unit length; (1, G) of one photo. Raises `PhotoError` for a broken one."""
        described = self._network.describe(asked(photos), Deadline())
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
        now, width = self._now, self._now.generation.manifest.described_dim
        try:
            queries = np.asarray(descriptors, np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"descriptors: expected numbers (n, {width}), not {type(descriptors).__name__}") from error
        if queries.ndim != 2 or queries.shape[1] != width or not np.isfinite(queries).all():
            raise UserError(f"descriptors of shape {queries.shape}: expected (n, {width}), all of them finite")
        where = Where(near=near, radius_m=radius_m, box=box, heading_deg=heading_deg, within_deg=within_deg)
        filters = now.generation.map.filters(where, len(queries))
        distances, ids = self._nearest(now, queries, np.arange(len(queries)), k, filters, Deadline())
        return [matches_of(now.generation, *_found(*row)) for row in zip(distances, ids, strict=True)]

    def score(self, photo: Photo, other: Photo) -> float:
        """Pair score of two photos: the sum of both directions' logits, higher = more likely the same place.

        Raises `PhotoError` for an unreadable photo.
        """
        return self._network.pair_score(Asked(photo), Asked(other), Deadline())

    def attention(self, photo: Photo, other: Photo) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Where the pair decoder looks in two photos: a square grid of patches of each, float32, each sums to 1.

        Weights of the class token's attention, mean over blocks, heads and both directions of the pair. The grid covers
        the whole photo. Raises `PhotoError` for an unreadable photo.
        """
        explained = self.explained(photo, other)
        return explained.over_photo, explained.over_other

    def explained(self, photo: Photo, other: Photo, *, deadline: Deadline | None = None) -> Explained:
        """`score` and `attention` together, for which each photo is encoded once.

        Raises `PhotoError` for an unreadable photo, and `TooLateError` after the deadline, between two forward passes.
        """
        return self._network.explained(Asked(photo), Asked(other), deadline or Deadline())

    def _opened(self, generation: Generation, before: Shards | None = None) -> _Now:
        check_positions_of_votes(self._rules.decision, generation.photos.utm_m)
        return _Now(generation, self._open_shards(generation, before))

    def _located(
        self, photos: Sequence[Asked], numbers: tuple[int, int], where: Where, deadline: Deadline
    ) -> list[Located | PhotoError]:
        """The steps of the job `query`, with the same photos in each forward pass."""
        clock = _Clock()
        photos = self._decoded(photos)
        clock.next("decode")
        described = self._network.describe(photos, deadline)
        clock.next("describe")
        return self._searched(photos, described, numbers, where, deadline, clock)

    def _decoded(self, photos: Sequence[Asked]) -> Sequence[Asked]:
        """A single photo is decoded once, if describing and scoring take the same pixels; others when needed, twice."""
        if len(photos) > 1 or not self._network.describes_what_it_scores:
            return photos
        try:
            return [Asked(photo.pixels(self._network.config), photo.place) for photo in photos]
        except PhotoError:
            return photos

    def _searched(
        self,
        photos: Sequence[Asked],
        described: Described,
        numbers: tuple[int, int],
        where: Where,
        deadline: Deadline,
        clock: _Clock,
    ) -> list[Located | PhotoError]:
        """Searching and scoring of described photos, in one generation."""
        now, (k, num_candidates) = self._now, numbers
        filters = now.generation.map.filters(where, len(photos))
        num_kept = self._search.num_kept(num_candidates)
        rows = self._nearest(now, described.descriptors, described.places, num_kept, filters, deadline)
        found = {place: _found(*row) for place, *row in zip(described.places.tolist(), *rows, strict=True)}
        clock.next("search")
        candidates = {place: ids[:num_candidates].tolist() for place, (ids, _) in found.items()}
        units = with_prior(work_units(candidates, self._rerank.queries_per_unit), found, self._rules.weights)
        scored = self._network.score(now.generation, photos, described.embedded, units, deadline)
        final = answers(len(photos), found, scored.by_place)
        if self._rules.decision is not None:
            final = decided(final, Decider(self._rules.decision, now.generation.map.places.utm_m))
        clock.next("rerank")
        broken, seconds = {**scored.broken, **described.broken}, Seconds(**clock.seconds)
        return [
            broken.get(answer.query_id) or located(now.generation, answer, k, self._rules, seconds) for answer in final
        ]

    def _nearest(
        self,
        now: _Now,
        descriptors: NDArray[np.float32],
        places: NDArray[np.int64],
        k: int,
        filters: tuple[Filters, Places] | None,
        deadline: Deadline,
    ) -> Found:
        """The k nearest for each descriptor (n, G); `places` (n,) are the photos' places in the request."""
        if filters is not None:
            filters = filters[0].of_queries(places), filters[1]
        if now.generation.reduction is not None:
            descriptors = now.generation.reduction(descriptors)
        return now.shards.search(descriptors, k, filters, deadline)


def answer_together(
    localizers: Sequence[Localizer],
    photo: Photo,
    *,
    k: int = 5,
    num_candidates: int | None = None,
    where: Where = ANYWHERE,
    deadline: Deadline | None = None,
) -> list[Located]:
    """The answer of each of several indices that share one network, which describes the photo once.

    Arguments and errors are those of `Localizer.answer`.
    """
    deadline, clock, first = deadline or Deadline(), _Clock(), localizers[0]
    numbers = [localizer._numbers(k, num_candidates) for localizer in localizers]
    if is_many(photo):
        raise UserError(f"{len(photo)} photos: expected one; `locate` takes several")
    photos = first._decoded(asked(photo))
    clock.next("decode")
    described = first._network.describe(photos, deadline)
    clock.next("describe")
    located = []
    for localizer, its in zip(localizers, numbers, strict=True):
        (answer,) = localizer._searched(photos, described, its, where, deadline, clock.copy())
        if isinstance(answer, PhotoError):
            raise answer
        located.append(answer)
    return located


class _Clock:
    """The seconds of steps that follow each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since_s = time.perf_counter()

    def next(self, step: str) -> None:
        """The step ends here."""
        now_s = time.perf_counter()
        self.seconds[step], self._since_s = now_s - self._since_s, now_s

    def copy(self) -> _Clock:
        """Another one with the same steps behind it, which goes on now."""
        copy = _Clock()
        copy.seconds = dict(self.seconds)
        return copy


def local_shards(search: SearchConfig, budget_bytes: float) -> OpenShards:
    """Opens shards in this process, of which `budget_bytes` stay in memory."""
    files = LocalCache(cache_directory(search.cache_dir), int(search.cache_gib * 2**30))

    def opened(generation: Generation, before: Shards | None) -> LocalShards:
        return LocalShards(generation, search, files, budget_bytes, before if isinstance(before, LocalShards) else None)

    return opened


def _found(
    squared_distances: NDArray[np.float32], ids: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and squared distances of a row of an answer, without its empty places."""
    is_there = ids != NO_ID
    return ids[is_there], squared_distances[is_there]


def _path(name: str, value: object) -> str:
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path or "\0" in path:
        raise UserError(f"{name}={value!r}: expected a path or URL")
    return path


def _section(name: str, given: SectionConfig | None, kind: type[SectionConfig]) -> SectionConfig:
    if given is not None and not isinstance(given, kind):
        raise UserError(f"{name}={given!r}: expected a pairvpr.{kind.__name__}")
    return kind() if given is None else given


def _settled(rerank: RerankConfig | None, calibration: str | os.PathLike[str] | None) -> RerankConfig:
    settings = _section("rerank", rerank, RerankConfig)
    if settings.num_candidates == 0:
        raise UserError(
            "rerank.num_candidates=0: a Localizer re-ranks; expected 1 or more, or retrieve(describe(photo))"
        )
    if settings.dense_features == DenseFeatures.store:
        raise UserError("rerank.dense_features=store: a Localizer can't use a store; expected cache or recompute")
    if settings.candidates is not None:
        raise UserError(f"rerank.candidates={settings.candidates}: a Localizer finds candidates itself; expected null")
    return settings if calibration is None else replace(settings, calibration=_path("calibration", calibration))


def _first_stage(
    network: ModelConfig, weights_sha256: str, describe: DescribeConfig, descriptor: DescriptorConfig | None
) -> FirstStage:
    return first_stage_of(network, weights_sha256, describe, _section("descriptor", descriptor, DescriptorConfig))


def _own_network(describe: DescribeConfig | None) -> DescribeConfig:
    settings = _section("describe", describe, DescribeConfig)
    if settings.descriptors is not None:
        raise UserError(f"describe.descriptors={settings.descriptors}: a Localizer describes photos itself")
    return settings


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device={device}: {storage.reason(error)}; expected cpu, cuda or cuda:N") from error
    return chosen


def _kind(kind: str) -> IndexKind:
    if kind not in list(IndexKind):
        raise UserError(f"kind={kind}: expected one of {', '.join(IndexKind)}")
    return IndexKind(kind)


def _positions(positions: str | None) -> PositionsConfig:
    if positions is None or positions in (PositionSource.names, PositionSource.exif):
        return PositionsConfig(positions=None if positions is None else PositionSource(positions))
    if not isinstance(positions, str) or not positions.lower().endswith((".csv", ".parquet")):
        raise UserError(f"positions={positions}: expected names, exif, or a table (.csv or .parquet)")
    return PositionsConfig(positions=PositionSource.table, positions_table=positions)


def _precision(precision: str) -> Precision:
    if precision not in list(Precision):
        raise UserError(f"precision={precision}: expected one of {', '.join(Precision)}")
    return Precision(precision)
