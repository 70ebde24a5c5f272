"""Features that are loaded ahead and kept: in order, each loaded when it must be, never more bytes than allowed."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pairvpr.data.images import BrokenImageError
from pairvpr.retrieval.features import LOADED_AHEAD, FeatureCache, PhotoFeatures

CPU = torch.device("cpu")


class Photos:
    """Loads numbers, embeds them as tensors of one value, and remembers both."""

    def __init__(self) -> None:
        self.loaded: list[int] = []
        self.embedded: list[int] = []

    def load(self, image_id: int) -> int:
        self.loaded.append(image_id)
        return image_id

    def embed(self, loaded: int) -> Tensor:
        self.embedded.append(loaded)
        return torch.tensor([float(loaded)])

    def features(self, cache: FeatureCache | None = None, num_threads: int = 1) -> PhotoFeatures[int]:
        return PhotoFeatures(self.load, self.embed, device=CPU, num_threads=num_threads, cache=cache)


def values(features: PhotoFeatures[int], image_ids: Sequence[int]) -> list[int]:
    """What is given for each photo."""
    return [int(tensor) for tensor in features(image_ids)]


@given(st.lists(st.integers(0, 20), max_size=30), st.integers(0, 40), st.integers(1, 3))
def test_every_photo_is_given_in_order(image_ids: list[int], capacity_bytes: int, num_threads: int) -> None:
    features = Photos().features(FeatureCache(capacity_bytes), num_threads)
    for _ in range(2):
        assert values(features, image_ids) == image_ids


def test_what_a_cache_has_is_not_loaded_again() -> None:
    photos = Photos()
    features = photos.features(FeatureCache(3 * 4))
    assert values(features, [1, 2, 3]) == [1, 2, 3]
    assert values(features, [2, 3, 4]) == [2, 3, 4]
    assert (sorted(photos.loaded), photos.embedded) == ([1, 2, 3, 4], [1, 2, 3, 4])
    assert values(features, [1]) == [1]  # the least recently used of the four went
    assert photos.embedded == [1, 2, 3, 4, 1]


def test_what_is_dropped_after_it_was_found_is_loaded_again() -> None:
    photos = Photos()
    features = photos.features(FeatureCache(2 * 4))
    values(features, [1, 2])
    assert values(features, [3, 4, 1, 2]) == [3, 4, 1, 2]
    assert photos.embedded == [1, 2, 3, 4, 1, 2]


def test_loading_runs_ahead_but_not_far() -> None:
    photos = Photos()
    is_loaded = threading.Semaphore(0)

    def load(image_id: int) -> int:
        is_loaded.release()
        return photos.load(image_id)

    given_features = PhotoFeatures(load, photos.embed, device=CPU)(range(100))
    next(given_features)
    for _ in range(LOADED_AHEAD + 1):
        assert is_loaded.acquire(timeout=60)
    assert photos.embedded == [0]
    given_features.close()  # type: ignore[attr-defined]
    assert not is_loaded.acquire(timeout=0.01)
    assert sorted(photos.loaded) == list(range(LOADED_AHEAD + 1))


def test_a_broken_photo_is_an_error_when_its_turn_comes() -> None:
    def load(image_id: int) -> int:
        if image_id == 2:
            raise BrokenImageError("truncated")
        return image_id

    given_features = PhotoFeatures(load, Photos().embed, device=CPU)([1, 2, 3])
    assert int(next(given_features)) == 1
    with pytest.raises(BrokenImageError, match="truncated"):
        next(given_features)


def test_no_thread_outlives_its_order() -> None:
    before = threading.active_count()
    values(Photos().features(num_threads=3), range(20))
    assert threading.active_count() == before


def test_what_was_used_last_stays_longest() -> None:
    cache = FeatureCache(2 * 4)
    one, two, three = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    cache.put("one", one)
    cache.put("two", two)
    assert cache.get("one", CPU) is one
    cache.put("three", three)
    assert (cache.get("one", CPU), cache.get("two", CPU), cache.get("three", CPU)) == (one, None, three)
    assert cache.used_bytes == 8


@given(
    st.integers(0, 200),
    st.integers(0, 200),
    st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40),
    st.lists(st.integers(0, 25), min_size=7, max_size=7),
)
def test_two_caches_never_exceed_their_bytes_and_forget_the_least_recently_used(
    front_bytes: int, behind_bytes: int, requests: list[tuple[bool, int]], lengths: list[int]
) -> None:
    """The one in front against a list; the other one is never asked for anything wrong."""
    behind = FeatureCache(behind_bytes)
    cache = FeatureCache(front_bytes, behind)
    tensors = [torch.zeros(length) for length in lengths]
    kept: list[int] = []  # least recently used first
    for is_put, key in requests:
        if is_put:
            cache.put(key, tensors[key])
            if key not in kept and 4 * lengths[key] <= front_bytes:
                kept.append(key)
                while sum(4 * lengths[other] for other in kept) > front_bytes:
                    kept.pop(0)
        else:
            is_there = key in cache
            assert is_there == (key in kept or key in behind)
            assert cache.get(key, CPU) is (tensors[key] if is_there else None)
            if key in kept:
                kept.append(kept.pop(kept.index(key)))
        assert cache.used_bytes == sum(4 * lengths[other] for other in kept) <= front_bytes
        assert behind.used_bytes <= behind_bytes


def test_what_a_cache_drops_goes_to_the_one_behind_it() -> None:
    behind = FeatureCache(2 * 4)
    cache = FeatureCache(1 * 4, behind)
    tensors = [torch.zeros(1) for _ in range(4)]
    for key, tensor in enumerate(tensors):
        cache.put(key, tensor)
    assert [key in cache for key in range(4)] == [False, True, True, True]
    assert [key in behind for key in range(4)] == [False, True, True, False]
    assert cache.get(1, CPU) is tensors[1]
    cache.put(4, torch.zeros(1))
    assert [key in behind for key in range(5)] == [False, True, False, True, False]  # 2 was used before 1
    large = torch.zeros(2)
    cache.put("large", large)
    assert behind.get("large", CPU) is large
