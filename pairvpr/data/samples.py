"""Training samples by epoch and position: a function of the seed and the photos only.

S = image side in pixels, L = patches per image. Any process may request any sample, in any order; a pickled
sampler contains its training sets, but nothing computed from them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Protocol

import numpy as np
from numpy.random import Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image

from pairvpr.data.augment import augment_stage_one, augment_stage_two
from pairvpr.data.images import BrokenImageError
from pairvpr.data.training_sets.base import TrainingSet, View
from pairvpr.errors import UserError

MAX_PLACES_TRIED = 100
PHOTOS_PER_PLACE = 4  # stage two (method, section 5)

Load = Callable[[View], Image.Image]  # an RGB photo, or `BrokenImageError`


class Stream(IntEnum):
    """Purposes of random numbers; different streams of one seed are independent."""

    STAGE_ONE_ORDER = 0
    STAGE_ONE_SAMPLE = 1
    STAGE_TWO_ORDER = 2
    STAGE_TWO_SAMPLE = 3


def rng_of(seed: int, stream: Stream, epoch: int = 0, position: int = 0) -> Generator:
    """The generator for one sample, or for one epoch's order; `seed` is not negative."""
    return np.random.default_rng(SeedSequence(seed, spawn_key=(stream, epoch, position)))


def rank_slice(batch: int, rank: int, world: int) -> range:
    """The contiguous part of a global batch that a rank owns; sizes differ by at most one, larger ones first."""
    size, remainder = divmod(batch, world)
    start = rank * size + min(rank, remainder)
    return range(start, start + size + (rank < remainder))


def num_batches(num_places: int, batch: int) -> int:
    """Complete global batches in an epoch; an incomplete last one is dropped."""
    if num_places < batch:
        raise UserError(
            f"train.global_batch_size={batch}: the training sets have only {num_places:,} places; expected a "
            "batch that fits into an epoch"
        )
    return num_places // batch


@dataclass(frozen=True, slots=True)
class Drawn:
    """Photos read for one place.

    `place` differs from the requested one if `num_places_skipped` is not 0; `num_redrawn` counts the broken photos that
    were drawn, including those of skipped places.
    """

    images: list[Image.Image]
    urls: tuple[str, ...]
    num_redrawn: int
    num_places_skipped: int
    place: int


def draw_views(training_set: TrainingSet, place: int, count: int, rng: Generator, load: Load) -> Drawn:
    """`count` readable photos of a place, or of the next place that has enough.

    If one is broken, all views are drawn again without it, because the views of a sample may depend on one another
    (SF-XL: they look at the same point). Raises `UserError` if `MAX_PLACES_TRIED` places in a row have too few.
    """
    num_redrawn = 0
    broken: dict[str, BrokenImageError] = {}
    num_tries = min(MAX_PLACES_TRIED, len(training_set))
    for num_skipped in range(num_tries):
        candidate = (place + num_skipped) % len(training_set)
        read, unreadable = _read_views(training_set, candidate, count, rng, load)
        broken = unreadable or broken
        num_redrawn += len(unreadable)
        if read:
            return Drawn(list(read.values()), tuple(view.url for view in read), num_redrawn, num_skipped, candidate)
    last = next((f"; the last broken one is {url} ({error})" for url, error in reversed(broken.items())), "")
    raise UserError(
        f"{training_set.name}: none of {num_tries} places, starting with number {place}, has {count} readable "
        f"photos{last}"
    )


def _read_views(
    training_set: TrainingSet, place: int, count: int, rng: Generator, load: Load
) -> tuple[dict[View, Image.Image], dict[str, BrokenImageError]]:
    """`count` views of a place with their photos, or none if it has too few; and the broken photos by URL.

    Both keep the order of drawing, so that nothing depends on the order of a set.
    """
    loaded: dict[View, Image.Image] = {}
    broken: dict[str, BrokenImageError] = {}
    while len(views := training_set.draw(place, count, rng, broken.keys())) == count:
        if not broken.keys().isdisjoint(view.url for view in views):
            raise RuntimeError(f"{training_set.name} drew a photo of place {place} that was already reported as broken")
        for view in views:
            if view not in loaded and view.url not in broken:
                try:
                    loaded[view] = load(view)
                except BrokenImageError as error:
                    broken[view.url] = error
        if all(view in loaded for view in views):
            return {view: loaded[view] for view in views}, broken
    return {}, broken


@dataclass(frozen=True, slots=True)
class PairSample:
    """Two views of one place for masked image modelling, from the training set `set_index`."""

    first: NDArray[np.uint8]  # (S, S, 3), to be masked
    second: NDArray[np.uint8]  # (S, S, 3)
    mask: NDArray[np.bool_]  # (L,), True = hidden from the encoder
    set_index: int
    urls: tuple[str, ...]
    num_redrawn: int
    num_places_skipped: int


@dataclass(frozen=True)
class PairSampler:
    """Stage one: every place of every training set once per epoch, shuffled anew in each epoch (method, section 4)."""

    training_sets: tuple[TrainingSet, ...]
    load: Load
    seed: int
    image_size_px: int
    num_patches: int  # L
    mask_ratio: float

    def __len__(self) -> int:
        """Places in an epoch."""
        return self._ends[-1]

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """The end of each training set in the list of all places."""
        return tuple(accumulate(len(training_set) for training_set in self.training_sets))

    def sample(self, epoch: int, position: int) -> PairSample:
        """The sample at a position, 0 <= position < `len`, of an epoch."""
        rng = rng_of(self.seed, Stream.STAGE_ONE_SAMPLE, epoch, position)
        place = int(epoch_order(len(self), self.seed, epoch)[position])
        set_index = bisect_right(self._ends, place)
        training_set = self.training_sets[set_index]
        place -= self._ends[set_index] - len(training_set)
        drawn = draw_views(training_set, place, 2, rng, self.load)
        first, second = (augment_stage_one(image, self.image_size_px, rng) for image in drawn.images)
        mask = random_mask(self.num_patches, self.mask_ratio, rng)
        return PairSample(first, second, mask, set_index, drawn.urls, drawn.num_redrawn, drawn.num_places_skipped)


@lru_cache(maxsize=2)
def epoch_order(num_places: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """(num_places,) int64, read-only: the places of a stage-one epoch in order."""
    order = rng_of(seed, Stream.STAGE_ONE_ORDER, epoch).permutation(num_places).astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def random_mask(num_patches: int, ratio: float, rng: Generator) -> NDArray[np.bool_]:
    """(L,) bool: exactly int(ratio L) patches, drawn uniformly, are True."""
    mask = np.zeros(num_patches, np.bool_)
    mask[rng.permutation(num_patches)[: int(ratio * num_patches)]] = True
    return mask


class CityTrainingSet(TrainingSet, Protocol):
    """A training set whose places are numbered city by city."""

    @property
    def cities(self) -> Sequence[tuple[str, range]]:
        """Name and places of each city, in order."""
        ...


@dataclass(frozen=True, slots=True)
class PlaceSample:
    """Photos of one place; `label` is the number of the place that they show, even if another was skipped."""

    images: NDArray[np.uint8]  # (PHOTOS_PER_PLACE, S, S, 3)
    label: np.int64
    urls: tuple[str, ...]
    num_redrawn: int
    num_places_skipped: int


@dataclass(frozen=True)
class PlaceSampler:
    """Stage two: cities in sequence, places shuffled within each city once per run (method, section 5)."""

    training_set: CityTrainingSet
    load: Load
    seed: int
    image_size_px: int
    num_operations: int  # of RandAugment

    def __len__(self) -> int:
        """Places in an epoch."""
        return sum(len(places) for places in self._cities)

    @cached_property
    def _cities(self) -> tuple[range, ...]:
        return tuple(places for _, places in self.training_set.cities)

    def sample(self, epoch: int, position: int) -> PlaceSample:
        """The sample at a position, 0 <= position < `len`, of an epoch."""
        rng = rng_of(self.seed, Stream.STAGE_TWO_SAMPLE, epoch, position)
        place = int(city_order(self._cities, self.seed)[position])
        drawn = draw_views(self.training_set, place, PHOTOS_PER_PLACE, rng, self.load)
        images = np.stack(
            [augment_stage_two(image, self.image_size_px, self.num_operations, rng) for image in drawn.images]
        )
        return PlaceSample(images, np.int64(drawn.place), drawn.urls, drawn.num_redrawn, drawn.num_places_skipped)


@lru_cache(maxsize=2)
def city_order(cities: tuple[range, ...], seed: int) -> NDArray[np.int64]:
    """(places of all cities,) int64, read-only: city by city, the places of each in a random order."""
    rng = rng_of(seed, Stream.STAGE_TWO_ORDER)
    order = np.concatenate([rng.permutation(np.asarray(places, np.int64)) for places in cities])
    order.flags.writeable = False
    return order
