"""Dense features of photos, prefetched and cached. Needs only torch.

L patches, D decoder width.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import torch
from torch import Tensor

Loaded = TypeVar("Loaded")

LOADED_AHEAD = 4
"""Prefetched photos per loading thread."""


class FeatureCache:
    """An LRU cache of features by key; evicted ones go to the cache `behind`, if there is one.

    That one is larger and slower: features of a GPU go to host memory and are copied back when they are requested. The
    copy stays there, so features that many units use are in both. Threads may share a cache.
    """

    def __init__(self, capacity_bytes: int, behind: FeatureCache | None = None) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self.behind = behind
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._lock = Lock()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._features or (self.behind is not None and key in self.behind)

    def get(self, key: Hashable, device: torch.device) -> Tensor | None:
        """The features kept for `key`, if any, on the device."""
        with self._lock:
            found = self._features.get(key)
            if found is not None:
                self._features.move_to_end(key)
        if found is not None:
            return found.to(device, non_blocking=True)
        return None if self.behind is None else self.behind.get(key, device)

    def put(self, key: Hashable, features: Tensor) -> None:
        """Cache features, which never change for a key; those larger than the cache are not kept."""
        with self._lock:
            if key in self._features:
                return
            if held_bytes(features) > self.capacity_bytes:
                self._hand_on(key, features)
                return
            self._features[key] = features
            self.used_bytes += held_bytes(features)
            while self.used_bytes > self.capacity_bytes:
                dropped_key, dropped = self._features.popitem(last=False)
                self.used_bytes -= held_bytes(dropped)
                self._hand_on(dropped_key, dropped)

    def _hand_on(self, key: Hashable, features: Tensor) -> None:
        if self.behind is not None and key not in self.behind and features.nbytes <= self.behind.capacity_bytes:
            self.behind.put(key, in_memory(features))


@dataclass(frozen=True)
class FeaturesOf:
    """The features of one index's photos in a cache that several indices share."""

    index: Hashable
    cache: FeatureCache

    def __contains__(self, image_id: int) -> bool:
        return (self.index, image_id) in self.cache

    def get(self, image_id: int, device: torch.device) -> Tensor | None:
        """As `FeatureCache.get`."""
        return self.cache.get((self.index, image_id), device)

    def put(self, image_id: int, features: Tensor) -> None:
        """As `FeatureCache.put`."""
        self.cache.put((self.index, image_id), features)


def held_bytes(features: Tensor) -> int:
    """The memory that features take: torch rounds pinned memory up to a power of two."""
    return 1 << (features.nbytes - 1).bit_length() if features.is_pinned() else features.nbytes


def in_memory(features: Tensor) -> Tensor:
    """A copy in host memory; from a GPU it is pinned and asynchronous.

    Only a copy back to the GPU reads it, and the GPU runs that after this one.
    """
    if features.device.type == "cpu":
        return features
    return torch.empty(features.shape, dtype=features.dtype, pin_memory=True).copy_(features, non_blocking=True)


class PhotoFeatures(Generic[Loaded]):
    """Features (L, D) of photos in a given order; `load` prefetches on its own threads, `embed` runs in the caller's.

    `load` reads a photo (pixels, or a stored record) and must be thread-safe; `embed` moves it to the device and
    through the network. Photos in `cache` are not loaded. For `lost` photos `load` returns a placeholder, whose
    features are not cached.
    """

    def __init__(
        self,
        load: Callable[[int], Loaded],
        embed: Callable[[Loaded], Tensor],
        *,
        device: torch.device,
        num_threads: int = 1,
        cache: FeatureCache | FeaturesOf | None = None,
        lost: Collection[int] = (),
    ) -> None:
        self._load = load
        self._embed = embed
        self._device = device
        self._num_threads = num_threads
        self._cache = cache or FeatureCache(0)
        self._lost = lost

    def __call__(self, image_ids: Sequence[int]) -> Iterator[Tensor]:
        """(L, D) of each photo, one at a time."""
        executor = ThreadPoolExecutor(self._num_threads)
        try:
            ahead: deque[tuple[int, Future[Loaded] | None]] = deque()
            for image_id in image_ids:
                ahead.append((image_id, None if image_id in self._cache else executor.submit(self._load, image_id)))
                if len(ahead) > LOADED_AHEAD * self._num_threads:
                    yield self._features(*ahead.popleft())
            while ahead:
                yield self._features(*ahead.popleft())
        finally:
            executor.shutdown(cancel_futures=True)

    def _features(self, image_id: int, loading: Future[Loaded] | None) -> Tensor:
        features = self._cache.get(image_id, self._device)
        if features is None:
            # It may have been evicted since the order began.
            features = self._embed(self._load(image_id) if loading is None else loading.result())
            if image_id not in self._lost:
                self._cache.put(image_id, features)
        return features
