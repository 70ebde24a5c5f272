"""Part files: descriptors wait here until their shard is complete. Nothing here imports torch: tasks start fast.

A part is a run of photos, a whole number of batches, cut from the manifest by position. The name and content of its
file depend only on settings and ids (except for the seconds it took), so an existing part is right, whoever wrote it.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from pairvpr.data import sealed, storage
from pairvpr.data.descriptor_file import read_rows
from pairvpr.data.manifest import Manifest, check_photos_are_seen
from pairvpr.data.photo_batches import PhotoBatch, PhotoSettings, load_batch, num_batches
from pairvpr.distributed.metrics import bytes_of, count_failure
from pairvpr.errors import IncompleteRunError
from pairvpr.index import descriptor_shards

Rows = Any
"""A batch of Ray Data: a dict from column names to arrays."""
BYTES_PER_PART = 32 << 20
MAX_BATCHES_PER_PART = 8
ENOUGH_PARTS = 32
PARTS_READ_AT_ONCE = 16
ARRAYS = ("first_id", "ids", "descriptors", "rejected_ids", "rejected_errors", "seconds")
"""The arrays in a part's file."""
REMARKS = {"remarked_ids": np.empty(0, np.int64), "remarks": np.empty(0, np.str_)}
"""Further arrays, which files of earlier versions lack."""


@dataclass(frozen=True)
class Parts:
    """The parts of `num_images` photos, below `directory`."""

    directory: str
    num_images: int
    photos_per_part: int

    @classmethod
    def of(cls, directory: str, num_images: int, batch_size: int, image_size_px: int) -> Parts:
        """At most 8 batches and 32 MiB of pixels in each; smaller if there would be few parts; at least one batch."""
        batch_bytes = batch_size * image_size_px * image_size_px * 3
        wanted = min(MAX_BATCHES_PER_PART, BYTES_PER_PART // batch_bytes, num_images // (ENOUGH_PARTS * batch_size))
        return cls(directory, num_images, batch_size * max(1, wanted))

    def __len__(self) -> int:
        return num_batches(self.num_images, self.photos_per_part)

    def ids(self, part: int) -> range:
        """The photos of a part."""
        first_id = part * self.photos_per_part
        return range(first_id, min(first_id + self.photos_per_part, self.num_images))

    def name(self, part: int) -> str:
        """File name of a part, which names its photos: other settings never pick up a part by mistake."""
        ids = self.ids(part)
        return f"{ids.start:09d}-{ids.stop:09d}.npz"

    def url(self, part: int) -> str:
        """Its file."""
        return storage.join(self.directory, self.name(part))

    def of_shard(self, shard: descriptor_shards.ShardRange) -> range:
        """The parts with the shard's photos; a part across a border belongs to both shards."""
        if shard.count == 0:
            return range(0)
        return range(shard.first_id // self.photos_per_part, (shard.stop_id - 1) // self.photos_per_part + 1)


def decode(
    rows: Rows, *, manifest: ray.ObjectRef[Manifest], photos_per_part: int, settings: PhotoSettings, step: str
) -> Rows:
    """Part numbers -> one row each: pixels as bytes, errors and remarks as JSON, and the seconds spent.

    Bytes that are read, and photos that can't be, count for `step`. Raises `UserError` if this node does not see the
    photo folder.
    """
    photos = ray.get(manifest)
    decoded: dict[str, list[Any]] = {"part": [], "pixels": [], "errors": [], "remarks": [], "seconds": []}
    with bytes_of(step):
        for part in rows["part"]:
            started_s = time.perf_counter()
            loaded = load_batch(photos, int(part), photos_per_part, settings)
            if loaded.errors:
                check_photos_are_seen(photos)
                count_failure(step, "photo", len(loaded.errors))
            decoded["part"].append(part)
            decoded["pixels"].append(loaded.pixels.tobytes())
            decoded["errors"].append(json.dumps(loaded.errors))
            decoded["remarks"].append(json.dumps(loaded.remarks))
            decoded["seconds"].append(time.perf_counter() - started_s)
    return decoded


def write(url: str, photos: PhotoBatch, descriptors: NDArray[np.float32], seconds: float) -> None:
    """Publish a part: `descriptors` (n, G) of its n photos; rows of broken photos are dropped."""
    ids, rows = photos.kept(descriptors)
    sink = io.BytesIO()
    np.savez(
        sink,
        allow_pickle=False,
        first_id=np.int64(photos.first_id),
        ids=ids,
        descriptors=rows,
        rejected_ids=np.array(list(photos.rejected), np.int64),
        rejected_errors=np.array(list(photos.rejected.values()), np.str_),
        remarked_ids=np.array(list(photos.remarked), np.int64),
        remarks=np.array(list(photos.remarked.values()), np.str_),
        seconds=np.float64(seconds),
    )
    sealed.seal_archive(sink)
    storage.write_bytes(url, sink.getvalue())


def commit_shard(
    directory: str,
    shard: descriptor_shards.ShardRange,
    part_urls: Sequence[str],
    descriptor_dim: int,
    first_id: int,
) -> None:
    """Gather a shard's rows from its parts, in id order, and publish it; ids count from `first_id`.

    Raises `IncompleteRunError` for a damaged part, which is deleted.
    """
    ids, rows = [np.empty(0, np.int64)], [np.empty((0, descriptor_dim), np.float32)]
    rejected: dict[int, str] = {}
    remarks: dict[int, str] = {}
    seconds = 0.0
    with ThreadPoolExecutor(PARTS_READ_AT_ONCE) as pool:
        read = pool.map(storage.read_bytes, part_urls)
    for url, data in zip(part_urls, read, strict=True):
        part = _arrays(url, data)
        inside = (part["ids"] >= shard.first_id) & (part["ids"] < shard.stop_id)
        ids.append(part["ids"][inside])
        rows.append(part["descriptors"][inside])
        for found, ids_name, texts_name in (
            (rejected, "rejected_ids", "rejected_errors"),
            (remarks, "remarked_ids", "remarks"),
        ):
            texts = zip(part[ids_name].tolist(), part[texts_name].tolist(), strict=True)
            found |= {image_id: text for image_id, text in texts if shard.first_id <= image_id < shard.stop_id}
        if shard.first_id <= int(part["first_id"]) < shard.stop_id:
            seconds += float(part["seconds"])
    all_ids = np.concatenate(ids)
    accounted = np.sort(np.concatenate([all_ids, np.fromiter(rejected, np.int64, len(rejected))]))
    assert np.array_equal(accounted, np.arange(shard.first_id, shard.stop_id)), "a photo is missing or double"
    if remarks:
        of_index = {image_id + first_id: remark for image_id, remark in remarks.items()}
        descriptor_shards.write_shard_remarks(directory, shard.shard, of_index)
    descriptor_shards.write_shard_description(
        directory,
        shard.shard,
        all_ids + first_id,
        np.concatenate(rows),
        first_id=shard.first_id + first_id,
        count=shard.count,
        rejected={image_id + first_id: error for image_id, error in rejected.items()},
        seconds=seconds,
    )


def copy_shard(
    directory: str,
    shard: descriptor_shards.ShardRange,
    url: str,
    descriptor_dim: int,
    rows: NDArray[np.int64],
    first_id: int,
) -> None:
    """Publish a shard whose descriptors are in a file (`read_rows`): `rows` (count,) says which row each photo has.

    Ids count from `first_id`. A photo of row -1 has none, and is rejected.
    """
    ids = np.arange(shard.first_id, shard.stop_id) + first_id
    has_row = rows >= 0
    descriptor_shards.write_shard_rows(
        directory,
        shard.shard,
        ids[has_row],
        descriptor_dim,
        read_rows(url, descriptor_dim, rows[has_row]),
        first_id=shard.first_id + first_id,
        count=shard.count,
        rejected=dict.fromkeys(ids[~has_row].tolist(), f"{url} has no row of it"),
    )


def _arrays(url: str, data: bytes) -> dict[str, NDArray[Any]]:
    """The arrays that `write` put into a part."""
    try:
        sealed.check_archive(io.BytesIO(data), url, "run the same command again to describe its photos again")
        with np.load(io.BytesIO(data), allow_pickle=False) as part:
            arrays = {name: part[name] for name in ARRAYS}
            arrays |= {name: part.get(name, nothing) for name, nothing in REMARKS.items()}
        first, stop = map(int, url.rsplit("/", 1)[-1].removesuffix(".npz").split("-"))
        here = np.sort(np.concatenate([arrays["ids"], arrays["rejected_ids"]]))
        if len(arrays["descriptors"]) != len(arrays["ids"]) or not np.array_equal(here, np.arange(first, stop)):
            raise ValueError("it belongs to other photos")
        return arrays
    except Exception as error:  # zip, zlib and numpy raise almost any exception on damaged bytes
        storage.remove_file(url)
        raise IncompleteRunError(
            f"{url} was damaged ({type(error).__name__}) and was deleted; run the same command again to redo it"
        ) from error
