"""Samples: what stands at a position is decided by the seed and the readable photos, and by nothing else."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.random import Generator
from PIL import Image

from pairvpr.data import samples
from pairvpr.data.images import BrokenImageError
from pairvpr.data.samples import PairSample, PairSampler, PlaceSample, PlaceSampler, Stream, draw_views
from pairvpr.data.training_sets.base import View
from pairvpr.errors import UserError


@dataclass(frozen=True)
class FakeSet:
    """Place p has the photos "name/p/0", "name/p/1", ...; optionally all views of a draw share one focal column."""

    name: str
    photos: tuple[int, ...]
    cities: tuple[tuple[str, range], ...] = ()
    focal: bool = False
    places_sha256: str = "of no list"

    def __len__(self) -> int:
        return len(self.photos)

    def draw(self, place: int, count: int, rng: Generator, broken: Collection[str] = ()) -> list[View]:
        left_px = int(rng.integers(10**9)) if self.focal else None
        urls = [url for i in range(self.photos[place]) if (url := f"{self.name}/{place}/{i}") not in broken]
        return [View(str(url), left_px) for url in rng.permutation(urls)[:count]]


@dataclass
class FakeLoad:
    """A photo whose pixels are decided by its URL; the broken ones raise. Keeps what it was asked for."""

    broken: frozenset[str] = frozenset()
    asked: list[View] = field(default_factory=list)

    def __call__(self, view: View) -> Image.Image:
        self.asked.append(view)
        if view.url in self.broken:
            raise BrokenImageError(f"spoilt {view.url}")
        rng = np.random.default_rng([ord(letter) for letter in view.url])
        return Image.fromarray(rng.integers(1, 256, (20, 24, 3), np.uint8))


def pair_sampler(load: FakeLoad | None = None, seed: int = 3, sets: tuple[FakeSet, ...] | None = None) -> PairSampler:
    sets = sets or (FakeSet("sfxl", (5,) * 7, focal=True), FakeSet("none", ()), FakeSet("gsv", (4, 6, 9)))
    return PairSampler(sets, load or FakeLoad(), seed, image_size_px=28, num_patches=40, mask_ratio=0.9)


def place_sampler(load: FakeLoad | None = None, seed: int = 3) -> PlaceSampler:
    cities = (("Rome", range(6)), ("OSL", range(6, 6)), ("Osaka", range(6, 15)))
    return PlaceSampler(FakeSet("gsv", (5,) * 15, cities), load or FakeLoad(), seed, image_size_px=28, num_operations=3)


def contents(sample: PairSample | PlaceSample) -> tuple[object, ...]:
    values = (getattr(sample, each.name) for each in fields(sample))
    return tuple(value.tobytes() if isinstance(value, np.ndarray) else value for value in values)


# Orders, slices, batches


@given(st.integers(0, 300), st.integers(1, 40))
def test_rank_slices_partition_the_batch(batch: int, world: int) -> None:
    slices = [samples.rank_slice(batch, rank, world) for rank in range(world)]
    assert [i for part in slices for i in part] == list(range(batch))
    sizes = [len(part) for part in slices]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 10_000), st.integers(1, 1000))
def test_only_whole_batches_count(num_places: int, batch: int) -> None:
    if num_places >= batch:
        num = samples.num_batches(num_places, batch)
        assert num * batch <= num_places < (num + 1) * batch
    else:
        with pytest.raises(UserError, match=f"^train.global_batch_size={batch}: .* only {num_places:,} places"):
            samples.num_batches(num_places, batch)


@given(st.integers(1, 500), st.integers(0, 2**63), st.integers(0, 2000))
def test_an_epochs_order_is_a_permutation(num_places: int, seed: int, epoch: int) -> None:
    order = samples.epoch_order(num_places, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(num_places))
    assert not order.flags.writeable


def test_orders_differ_between_epochs_and_seeds() -> None:
    orders = {tuple(samples.epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.integers(0, 2**32))
def test_cities_follow_one_another_with_their_places_shuffled(sizes: list[int], seed: int) -> None:
    ends = np.cumsum(sizes).tolist()
    cities = tuple(range(end - size, end) for size, end in zip(sizes, ends, strict=True))
    order = samples.city_order(cities, seed)
    assert order.dtype == np.int64
    for places in cities:
        assert sorted(order[places.start : places.stop]) == list(places)


def test_places_of_a_city_are_shuffled_by_the_seed() -> None:
    orders = {tuple(samples.city_order((range(20), range(20, 40)), seed)) for seed in range(10)}
    assert len(orders) == 10
    assert len({order[:20] for order in orders}) == 10


def test_streams_never_coincide() -> None:
    wide = (0, 1, 2, 2**32 - 1, 2**32, 2**32 + 1)
    keys = [(s, stream, e, p) for s in wide for stream in Stream for e in (0, 1, 2**20) for p in (0, 1, 2**20)]
    firsts = {samples.rng_of(*key).bytes(16) for key in keys}
    assert len(firsts) == len(keys)


# Masks


@given(st.integers(1, 600), st.floats(0, 1), st.integers(0, 2**32))
def test_a_mask_hides_exactly_the_whole_part_of_its_share(num_patches: int, ratio: float, seed: int) -> None:
    mask = samples.random_mask(num_patches, ratio, np.random.default_rng(seed))
    assert mask.dtype == np.bool_
    assert mask.shape == (num_patches,)
    assert mask.sum() == int(ratio * num_patches)


def test_the_published_mask_hides_230_of_256() -> None:
    assert samples.random_mask(256, 0.9, np.random.default_rng(0)).sum() == 230


def test_masks_are_uniform_over_all_choices() -> None:
    rng, num = np.random.default_rng(0), 6000
    codes = [int(samples.random_mask(6, 0.5, rng) @ (1 << np.arange(6))) for _ in range(num)]
    values, counts = np.unique(codes, return_counts=True)
    assert len(values) == 20  # 6 choose 3
    assert ((counts - num / 20) ** 2 / (num / 20)).sum() < 43.8  # chi2, 19 d.o.f., p = 0.001


# Drawing


@st.composite
def spoilt_sets(draw: st.DrawFn) -> tuple[FakeSet, frozenset[str]]:
    photos = tuple(draw(st.lists(st.integers(0, 6), min_size=1, max_size=6)))
    urls = [f"set/{place}/{i}" for place, num in enumerate(photos) for i in range(num)]
    broken = draw(st.sets(st.sampled_from(urls))) if urls else set()
    return FakeSet("set", photos, focal=draw(st.booleans())), frozenset(broken)


@settings(max_examples=200, deadline=None)
@given(spoilt_sets(), st.integers(0, 5), st.integers(1, 4), st.integers(0, 2**32))
def test_broken_photos_give_way_and_are_counted(
    spoilt: tuple[FakeSet, frozenset[str]], start: int, count: int, seed: int
) -> None:
    fake, broken = spoilt
    start, load = start % len(fake), FakeLoad(broken)
    readable = [
        {url for i in range(num) if (url := f"set/{place}/{i}") not in broken} for place, num in enumerate(fake.photos)
    ]
    after = [(start + i) % len(fake) for i in range(len(fake))]
    enough = [place for place in after if len(readable[place]) >= count]
    rng = np.random.default_rng(seed)
    if not enough:
        with pytest.raises(UserError, match=f"set: none of {len(fake)} places"):
            draw_views(fake, start, count, rng, load)
        return
    drawn = draw_views(fake, start, count, rng, load)
    assert drawn.place == enough[0]
    assert drawn.num_places_skipped == after.index(enough[0])
    assert len(set(drawn.urls)) == len(drawn.urls) == len(drawn.images) == count
    assert set(drawn.urls) <= readable[drawn.place]
    met = [view.url for view in load.asked if view.url in broken]
    assert drawn.num_redrawn == len(met) == len(set(met))
    assert len(load.asked) == len(set(load.asked))
    for url, image in zip(drawn.urls, drawn.images, strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(FakeLoad()(View(url))))


def test_a_redraw_of_a_focal_set_redraws_every_view() -> None:
    fake = FakeSet("sfxl", (3,), focal=True)
    redrawn = 0
    for seed in range(20):
        load = FakeLoad(frozenset({"sfxl/0/1"}))
        drawn = draw_views(fake, 0, 2, np.random.default_rng(seed), load)
        kept = [view for view in load.asked if view.url in drawn.urls][-2:]
        assert {view.url for view in kept} == set(drawn.urls) == {"sfxl/0/0", "sfxl/0/2"}
        assert len({view.left_px for view in kept}) == 1
        redrawn += drawn.num_redrawn
    assert 0 < redrawn < 20


def test_readable_photos_are_drawn_uniformly_whatever_is_broken() -> None:
    fake, load = FakeSet("set", (5,)), FakeLoad(frozenset({"set/0/2"}))
    rng = np.random.default_rng(0)
    pairs = [frozenset(draw_views(fake, 0, 2, rng, load).urls) for _ in range(3000)]
    _, counts = np.unique([sorted(pair) for pair in pairs], axis=0, return_counts=True)
    assert len(counts) == 6  # 4 choose 2
    assert ((counts - 500) ** 2 / 500).sum() < 20.5  # chi2, 5 d.o.f., p = 0.001


def test_a_set_that_is_all_broken_is_given_up_with_its_name_and_an_error() -> None:
    fake = FakeSet("gldv2", (4,) * 150)
    load = FakeLoad(frozenset(f"gldv2/{place}/{i}" for place in range(150) for i in range(4)))
    with pytest.raises(UserError) as raised:
        draw_views(fake, 120, 3, np.random.default_rng(0), load)
    assert str(raised.value).startswith("gldv2: none of 100 places, starting with number 120, has 3 readable photos; ")
    assert "spoilt gldv2/69/" in str(raised.value)  # the hundredth
    assert "\n" not in str(raised.value)
    assert {view.url.split("/")[1] for view in load.asked} == {str(i % 150) for i in range(120, 220)}


def test_a_set_of_too_small_places_is_given_up_without_an_error_to_name() -> None:
    with pytest.raises(UserError, match=r"none of 2 places, starting with number 1, has 3 readable photos$"):
        draw_views(FakeSet("set", (2, 2)), 1, 3, np.random.default_rng(0), FakeLoad())


class _Stubborn(FakeSet):
    def draw(self, place: int, count: int, rng: Generator, broken: Collection[str] = ()) -> list[View]:
        return super().draw(place, count, rng)


def test_a_set_that_draws_broken_photos_again_is_a_defect_and_no_endless_loop() -> None:
    with pytest.raises(RuntimeError, match="already reported as broken"):
        draw_views(_Stubborn("set", (2,)), 0, 2, np.random.default_rng(0), FakeLoad(frozenset({"set/0/0"})))


# Samples


def test_a_pair_sample_holds_two_views_of_one_place_and_a_mask() -> None:
    sampler = pair_sampler()
    assert len(sampler) == 10
    for sample in (sampler.sample(0, position) for position in range(10)):
        assert sample.first.shape == sample.second.shape == (28, 28, 3)
        assert sample.first.dtype == sample.second.dtype == np.uint8
        assert (sample.mask.dtype, sample.mask.shape, sample.mask.sum()) == (np.bool_, (40,), 36)
        (set_name, place, first), (other_name, other_place, second) = (url.split("/") for url in sample.urls)
        assert (set_name, place) == (other_name, other_place)
        assert first != second
        assert sampler.training_sets[sample.set_index].name == set_name
        assert (sample.num_redrawn, sample.num_places_skipped) == (0, 0)
        assert sample.first.any(axis=-1).all()


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_every_place_of_every_set_comes_once_an_epoch(sizes: list[int], epoch: int) -> None:
    sets = tuple(FakeSet(f"set{i}", (3,) * size) for i, size in enumerate(sizes))
    sampler = pair_sampler(sets=sets)
    seen = [sampler.sample(epoch, position).urls[0].rsplit("/", 1)[0] for position in range(len(sampler))]
    assert sorted(seen) == sorted(f"set{i}/{place}" for i, size in enumerate(sizes) for place in range(size))


def test_a_place_sample_holds_four_photos_and_the_number_of_its_place() -> None:
    sampler = place_sampler()
    assert len(sampler) == 15
    labels = []
    for sample in (sampler.sample(0, position) for position in range(15)):
        assert sample.images.shape == (4, 28, 28, 3)
        assert sample.images.dtype == np.uint8
        assert sample.label.dtype == np.int64
        assert len(set(sample.urls)) == 4
        assert {url.split("/")[1] for url in sample.urls} == {str(sample.label)}
        labels.append(int(sample.label))
    assert sorted(labels[:6]) == list(range(6))
    assert sorted(labels[6:]) == list(range(6, 15))
    assert labels == [int(sampler.sample(8, position).label) for position in range(15)]  # once per run


def test_photos_of_a_place_are_drawn_anew_each_epoch() -> None:
    sampler = place_sampler()
    assert len({sampler.sample(epoch, 0).urls for epoch in range(10)}) > 5
    assert len({sampler.sample(epoch, 0).images.tobytes() for epoch in range(10)}) == 10


def test_a_skipped_place_lends_its_turn_and_not_its_label() -> None:
    load = FakeLoad(frozenset({"gsv/4/0", "gsv/4/3"}))
    sampler = place_sampler(load)
    position = samples.city_order((range(6), range(6, 6), range(6, 15)), 3).tolist().index(4)
    sample = sampler.sample(0, position)
    assert (sample.label, sample.num_places_skipped) == (5, 1)
    assert sample.num_redrawn in (1, 2)
    assert all(url.startswith("gsv/5/") for url in sample.urls)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=6), st.sampled_from(["pair", "place"]))
def test_a_sample_does_not_depend_on_what_was_loaded_before(before: list[tuple[int, int]], kind: str) -> None:
    broken = frozenset({"sfxl/1/2", "gsv/0/3", "gsv/4/1"})
    make = {"pair": pair_sampler, "place": place_sampler}[kind]
    sampler = make(FakeLoad(broken))
    for epoch, position in before:
        sampler.sample(epoch, position)
    assert contents(sampler.sample(1, 2)) == contents(make(FakeLoad(broken)).sample(1, 2))


def test_seeds_epochs_and_positions_all_matter() -> None:
    drawn = [pair_sampler(seed=seed).sample(e, p) for seed in range(3) for e in range(3) for p in range(3)]
    for kind in ("first", "second", "mask"):
        assert len({getattr(sample, kind).tobytes() for sample in drawn}) == 27


def in_a_process(sampler: PairSampler | PlaceSampler) -> list[tuple[object, ...]]:
    return [contents(sampler.sample(epoch, position)) for epoch in range(2) for position in range(10)]


def test_a_fresh_process_draws_the_same_samples() -> None:
    load = FakeLoad(frozenset({"sfxl/1/2", "gsv/0/3"}))
    samplers: list[PairSampler | PlaceSampler] = [pair_sampler(load), place_sampler(load)]
    here = [in_a_process(sampler) for sampler in samplers]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(in_a_process, samplers)) == here


def test_a_pickled_sampler_holds_no_order() -> None:
    sampler = pair_sampler(sets=(FakeSet("one", (2,)),))
    before = len(pickle.dumps(sampler))
    samples.epoch_order(100_000, sampler.seed, 0)
    sampler.sample(0, 0)
    assert len(pickle.dumps(sampler)) < before + 200


def test_an_epochs_order_is_computed_once() -> None:
    assert samples.epoch_order(1000, 5, 5) is samples.epoch_order(1000, 5, 5)
