"""Fills the store of dense features that a run re-ranks from, a shard per work unit, in a pool of actors.

A shard's images and bytes depend only on settings and ids: two attempts at a shard write the same bytes, and a finished
shard is right, whoever filled it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pairvpr.config.schema import RerankConfig
from pairvpr.data import sealed, storage
from pairvpr.data.claim import check_claim, check_writable, claim, differences
from pairvpr.data.manifest import Manifest, check_photos_are_seen
from pairvpr.distributed.capacity import disk_bytes
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.pool import PoolActor, SupervisedPool
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import plan_actors
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index.plan import size_text
from pairvpr.retrieval import dense_store
from pairvpr.retrieval.dense_store import DenseStore, Layout, StoreManifest
from pairvpr.retrieval.features import PhotoFeatures
from pairvpr.retrieval.pipeline import load_pixels, no_pixels
from pairvpr.retrieval.unreadable import Unreadable
from pairvpr.terminal import say

KEY = "rerank.store_path"
WHOLE_DATABASE = "whole database"
SECONDS = "seconds.json"
NUM_FAILURES_NAMED = 5


@dataclass(frozen=True, kw_only=True)
class WantedStore:
    """The store that a run needs at `url` (absolute path or URL). `model` is the section of an index's settings."""

    url: str
    model: Mapping[str, Any]
    layout: Layout
    database: Manifest
    config: RerankConfig

    def settings(self, ids: str) -> dict[str, Any]:
        """The settings that decide the store's bytes; `ids` says which images it is for."""
        return {
            "model": {name: value for name, value in self.model.items() if name != "name"},
            "num_threads_per_actor": self.config.num_threads_per_actor,
            "database": {
                "root": self.database.root,
                "num_images": len(self.database),
                "paths_sha256": self.database.paths_sha256,
            },
            "stored_as": str(self.config.stored_as),
            "ids": ids,
        }


def check_store(wanted: WantedStore) -> None:
    """Raise `UserError` if `wanted.url` has a store of another model, database or format, or is not writable.

    Its images are checked later, when they are known.
    """
    manifest = dense_store.read_manifest(wanted.url)
    if manifest is not None:
        ids = WHOLE_DATABASE if wanted.config.store_whole_database else manifest.settings["ids"]
        _check_finished(wanted.url, manifest.settings, wanted.settings(ids))
        return
    check_writable(wanted.url, KEY)
    check_claim(
        wanted.url,
        wanted.settings(WHOLE_DATABASE),
        KEY,
        ignored=() if wanted.config.store_whole_database else ("ids",),
    )


def check_sharing(stores: Sequence[WantedStore]) -> None:
    """Raise `UserError` if several runs need different stores at the same URL."""
    first_at: dict[str, WantedStore] = {}
    for wanted in stores:
        first = first_at.setdefault(wanted.url, wanted)
        if first is wanted:
            continue
        if first.settings(WHOLE_DATABASE) != wanted.settings(WHOLE_DATABASE):
            raise UserError(
                f"{KEY}={wanted.url}: these benchmarks have different databases; expected a separate store for each"
            )
        manifest = None if wanted.config.store_whole_database else dense_store.read_manifest(wanted.url)
        if not wanted.config.store_whole_database and not _holds_whole_database(manifest):
            raise UserError(
                f"{KEY}={wanted.url}: these benchmarks have different candidates; expected "
                "rerank.store_whole_database=true, or null (a separate store for each)"
            )


def _check_finished(url: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    found = differences(there, here)
    if found:
        raise UserError(
            f"{KEY}={url}: the finished store there differs: {'; '.join(found)}; expected one made with the same "
            "settings or another directory"
        )


def make_store(
    wanted: WantedStore,
    candidates: NDArray[np.int64],
    all_ids: Callable[[], NDArray[np.int64]],
    source: ModelSource,
) -> DenseStore:
    """Fill and open the store, with features for `candidates` (n,), ascending; finished shards are kept.

    `all_ids` gives the ids of all readable photos, for a store of the whole database. Raises `UserError` if the store
    there was made with other settings, is damaged, lacks a candidate, or would not fit on the disk, and
    `IncompleteRunError`, after everything else is done, if shards failed for good.
    """
    manifest = dense_store.read_manifest(wanted.url)
    is_whole = wanted.config.store_whole_database or _holds_whole_database(manifest)
    digest = hashlib.sha256(candidates.astype("<i8").tobytes()).hexdigest()
    settings = wanted.settings(WHOLE_DATABASE if is_whole else digest)
    if manifest is not None:
        _check_finished(wanted.url, manifest.settings, settings)
        say("store: finished earlier, skipped")
    else:
        ids = all_ids() if is_whole else candidates
        _check_room(wanted, len(ids))
        claim(wanted.url, settings, KEY)
        _fill(wanted, ids, source, settings)
    store = DenseStore.open(wanted.url)
    missing = store.missing(candidates)
    if len(missing):
        raise UserError(
            f"{KEY}={wanted.url}: the store lacks {len(missing):,} of {len(candidates):,} candidates, the first is "
            f"{wanted.database.path(int(missing[0]))}; expected a store of all of them, or another directory"
        )
    return store


def _holds_whole_database(manifest: StoreManifest | None) -> bool:
    return manifest is not None and manifest.settings["ids"] == WHOLE_DATABASE


def _check_room(wanted: WantedStore, num_images: int) -> None:
    store_bytes, disk = num_images * wanted.layout.record_bytes, disk_bytes(wanted.url)
    if disk is not None and store_bytes > disk:
        raise UserError(
            f"{KEY}={wanted.url}: dense features of {num_images:,} photos take {size_text(store_bytes)} of disk, but "
            f"only {size_text(disk)} can be used; expected another disk, rerank.stored_as=int8, or "
            "rerank.dense_features=cache"
        )


def _fill(wanted: WantedStore, ids: NDArray[np.int64], source: ModelSource, settings: Mapping[str, Any]) -> None:
    """Fill the missing shards, and publish the manifest."""
    shards = dense_store.cut(ids, wanted.layout)
    rows = dense_store.read_rows(wanted.url, shards, wanted.layout)
    pending = {shard: (shard, shards[shard]) for shard, row in enumerate(rows) if row is None}
    num_pending = sum(len(ids_of_shard) for _, ids_of_shard in pending.values())
    failed: dict[int, str] = {}
    with Progress("store", len(ids), "photos", already_done=len(ids) - num_pending) as progress:
        if pending:
            plan = plan_actors(wanted.config)
            make_actor = _StoreActor.options(**plan.actor_options()).remote
            args = (source, ray.put(wanted.database), wanted.url, wanted.layout, wanted.config)
            num_actors = min(plan.num_actors, len(pending))
            with SupervisedPool[_Unit](lambda: make_actor(*args), num_actors, "store") as pool:
                failed = pool.run(pending, lambda shard, _: progress.add(len(shards[shard])))
        _raise_failures(failed)
        sealed.write_json(storage.join(wanted.url, SECONDS), {"seconds": sum(_seconds(wanted.url, len(shards)))})
        dense_store.finish(wanted.url, shards, wanted.layout, settings)


def _raise_failures(failed: Mapping[int, str]) -> None:
    if not failed:
        return
    named = "; ".join(f"shard {shard}: {error}" for shard, error in sorted(failed.items())[:NUM_FAILURES_NAMED])
    more = f"; and {len(failed) - NUM_FAILURES_NAMED} more" if len(failed) > NUM_FAILURES_NAMED else ""
    raise IncompleteRunError(
        f"{len(failed)} shards of dense features failed three times: {named}{more}. Everything else is kept: run "
        "the same command again to retry only these"
    )


_Unit = tuple[int, NDArray[np.int64]]
"""A shard and its ids (n,)."""


@ray.remote
class _StoreActor(PoolActor):
    """Computes features photo by photo, and publishes each shard before reporting it done."""

    def __init__(self, source: ModelSource, database: Manifest, url: str, layout: Layout, config: RerankConfig) -> None:
        self.database, self.url, self.layout = database, url, layout
        describer = source.describer(config.num_threads_per_actor)
        self.unreadable = Unreadable()
        load = partial(load_pixels, database, source.config)
        self.features = PhotoFeatures(
            self.unreadable.guarded(load, lambda: no_pixels(source.config)),
            describer.embedded,
            device=describer.device,
            num_threads=config.num_loading_threads,
        )

    def run(self, unit: _Unit) -> None:
        started_s = time.perf_counter()
        shard, ids = unit
        if dense_store.read_row(self.url, shard, ids, self.layout) is not None:
            return  # an earlier attempt published it, but its report was lost
        features = self.features(ids.tolist())
        dense_store.write_shard(self.url, shard, ids, self.layout, features, self._checked_reasons)
        sealed.write_json(_seconds_url(self.url, shard), {"seconds": time.perf_counter() - started_s})

    def _checked_reasons(self) -> Mapping[int, str]:
        """Reasons for unreadable photos. Raises `UserError` if this node sees no photo at all."""
        if self.unreadable.reasons:
            check_photos_are_seen(self.database)
        return self.unreadable.reasons


def _seconds_url(store: str, shard: int) -> str:
    return storage.join(store, dense_store.shard_path(shard), SECONDS)


def _seconds(store: str, num_shards: int) -> Sequence[float]:
    """Seconds that each shard took; 0 if its writer died before recording them."""

    def of_shard(shard: int) -> float:
        return _read_seconds(_seconds_url(store, shard)) or 0.0

    with ThreadPoolExecutor(dense_store.READ_AT_ONCE) as pool:
        return list(pool.map(of_shard, range(num_shards)))


def _read_seconds(url: str) -> float | None:
    """The seconds in a file; None if it is missing or (with a warning) damaged."""
    try:
        found = sealed.read_json(url, "seconds of work are reported without it")
        seconds = None if found is None else found.get("seconds")
        return float(seconds) if isinstance(seconds, int | float) else None
    except sealed.DamagedFileError as error:
        sealed.warn(error)
        return None


def about_store(wanted: WantedStore) -> dict[str, Any]:
    """The report's entry on the store: number format, images, seconds of work of all actors; null if it is gone."""
    manifest = dense_store.read_manifest(wanted.url)
    seconds = _read_seconds(storage.join(wanted.url, SECONDS))
    return {
        "values": wanted.layout.values,
        "kib_per_image": wanted.layout.record_bytes / 1024,
        "num_images": None if manifest is None else manifest.num_images,
        "seconds": seconds,
    }
