"""Descriptors of photos on storage: the shards of an index before there is an index.

    images.parquet     every photo, rejected ones too; an id is a position here
    rejected.parquet   path and error of every photo that could not be read
    remarks.parquet    path and remark of every photo that was read though something is odd about it; only if there are
    shards/00000/      ids.npy (n,) int64, descriptors.npy (n, G) float32, described.json

`described.json` is the last file of a shard's description, at the root the last of all of them. The queries of a run
are such a directory; an index has faiss files and a manifest beside it (`manifest.py`). The full description of the
format is in `docs/formats.md`.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairvpr.data import sealed, storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index.manifest import StoredFile, read_checked

REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("error", pa.string())])
REMARKS = "remarks.parquet"
REMARKS_SCHEMA = pa.schema([("path", pa.string()), ("remark", pa.string())])
READ_AT_ONCE = 16
ARRAYS = ("ids.npy", "descriptors.npy")
_MOST_HEADER_BYTES = 4096


@dataclass(frozen=True)
class ShardRange:
    """The contiguous ids [first_id, first_id + count) that a shard covers; rejected photos are among them."""

    shard: int
    first_id: int
    count: int

    @property
    def stop_id(self) -> int:
        """One past the last id."""
        return self.first_id + self.count


@dataclass(frozen=True)
class ShardDescription:
    """`described.json` of a shard: its range, the photos rejected in it, what describing it took, and its files.

    Ids are those of the index, which continue those of earlier generations.
    """

    first_id: int
    count: int
    num_rows: int
    rejected: dict[int, str]
    seconds: float
    files: dict[str, StoredFile]


def shard_ranges(num_images: int, num_shards: int) -> list[ShardRange]:
    """Equal contiguous cuts of the ids 0..num_images-1; the first ones may be empty if there are few photos."""
    cuts = [shard * num_images // num_shards for shard in range(num_shards + 1)]
    return [ShardRange(shard, first, stop - first) for shard, (first, stop) in enumerate(itertools.pairwise(cuts))]


def shard_path(shard: int) -> str:
    """Where a described shard lies, relative to its directory."""
    return f"shards/{shard:05d}"


def write_array(directory: str, path: str, array: NDArray[Any]) -> StoredFile:
    """Publish an array as .npy; returns its size and digest, as they were before it left this machine."""
    with storage.written_locally(storage.join(directory, path)) as local:
        with local.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        return StoredFile(path=path, bytes=local.stat().st_size, sha256=storage.sha256(str(local)))


def read_array(url: str) -> NDArray[Any]:
    """The array of a .npy file: memory-mapped if it is local, else read whole."""
    if storage.is_local(url):
        return np.load(storage.local_path(url), mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)


def read_checked_array(directory: str, file: StoredFile) -> NDArray[Any]:
    """The array of a .npy file, in memory. Raises `UserError`, naming it, where it is missing or has changed."""
    return np.load(io.BytesIO(read_checked(directory, file)), allow_pickle=False)


def read_some_rows(url: str, runs: Sequence[range]) -> NDArray[np.float32]:
    """Some rows of a .npy file of float32 (n, G), run by run; of a remote file only these bytes are read."""
    if storage.is_local(url):
        rows = read_array(url)
        return np.concatenate([np.empty((0, rows.shape[1]), np.float32), *(rows[run.start : run.stop] for run in runs)])
    head = io.BytesIO(storage.read_head(url, _MOST_HEADER_BYTES))
    np.lib.format.read_magic(head)
    shape, _, _ = np.lib.format.read_array_header_1_0(head)
    row_bytes, offset = 4 * shape[1], head.tell()
    pieces = storage.read_ranges(url, [(offset + run.start * row_bytes, offset + run.stop * row_bytes) for run in runs])
    return np.frombuffer(b"".join(pieces), np.float32).reshape(-1, shape[1])


def write_shard_description(
    directory: str,
    shard: int,
    ids: NDArray[np.int64],
    descriptors: NDArray[np.float32],
    *,
    first_id: int,
    count: int,
    rejected: dict[int, str],
    seconds: float,
) -> ShardDescription:
    """Publish a described shard; its `described.json` comes last.

    Raises `UserError` for a descriptor that is not finite, naming the first image id.
    """
    is_finite = np.isfinite(descriptors).all(axis=1)
    if not is_finite.all():
        raise UserError(
            f"{storage.join(directory, shard_path(shard))}: the descriptor of image {ids[~is_finite][0]} is not finite "
            f"({(~is_finite).sum():,} of {len(ids):,} are not); expected sound weights and model.precision=fp32 or bf16"
        )
    arrays = dict(zip(ARRAYS, (ids, descriptors), strict=True))
    files = {name: write_array(directory, f"{shard_path(shard)}/{name}", array) for name, array in arrays.items()}
    about = ShardDescription(first_id, count, len(ids), rejected, seconds, files)
    storage.write_json(_described_url(directory, shard), asdict(about))
    return about


def _described_url(directory: str, shard: int) -> str:
    return storage.join(directory, shard_path(shard), "described.json")


def remove_shard_description(directory: str, shard: int) -> None:
    """A shard is not described any more."""
    storage.remove_file(_described_url(directory, shard))


def read_shard_description(directory: str, shard: int) -> ShardDescription | None:
    """A shard's `described.json`, or None while the shard is not finished."""
    try:
        content = storage.read_json(_described_url(directory, shard))
    except FileNotFoundError:
        return None
    content["rejected"] = {int(image_id): error for image_id, error in content["rejected"].items()}
    content["files"] = {name: StoredFile(**file) for name, file in content["files"].items()}
    return ShardDescription(**content)


def write_shard_remarks(directory: str, shard: int, remarks: dict[int, str]) -> None:
    """Publish what is odd about photos of a shard, by image id, before its description."""
    sealed.write_json(_remarks_url(directory, shard), {str(image_id): remark for image_id, remark in remarks.items()})


def _remarks_url(directory: str, shard: int) -> str:
    return storage.join(directory, shard_path(shard), "remarks.json")


def _write_remarks(directory: str, images: Manifest, num_shards: int, first_id: int) -> None:
    """Publish remarks.parquet of all shards, where there are remarks."""
    urls = [_remarks_url(directory, shard) for shard in range(num_shards)]
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        found = pool.map(lambda url: sealed.read_json(url, "delete it, remarks are for people"), urls)
    remarks = {int(image_id): remark for its in found for image_id, remark in (its or {}).items()}
    if remarks:
        rows = [{"path": images.path(image_id - first_id), "remark": remarks[image_id]} for image_id in sorted(remarks)]
        sealed.write_parquet(storage.join(directory, REMARKS), pa.Table.from_pylist(rows, REMARKS_SCHEMA))


def read_remarks(directory: str) -> list[tuple[str, str]]:
    """Path and remark of every photo of a description that was read with a remark."""
    url = storage.join(directory, REMARKS)
    table = sealed.read_parquet(url, REMARKS_SCHEMA, "delete it, remarks are for people")
    return [] if table is None else [(row["path"], row["remark"]) for row in table.to_pylist()]


def about_remarks(directory: str) -> list[str]:
    """A line for each kind of remark (what stands before its colon): how many photos, and the first of them."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for path, remark in read_remarks(directory):
        kinds.setdefault(remark.split(":")[0], []).append((path, remark))
    url = storage.join(directory, REMARKS)
    return [f"{len(rows):,} photos: {rows[0][1]} ({rows[0][0]}; all in {url})" for rows in kinds.values()]


def finish_description(directory: str, images: Manifest, shards: list[ShardDescription], first_id: int = 0) -> None:
    """Publish rejected.parquet and, last, the root's described.json; `first_id` is that of the first photo."""
    rejected = {image_id: error for shard in shards for image_id, error in shard.rejected.items()}
    rows = [{"path": images.path(image_id - first_id), "error": rejected[image_id]} for image_id in sorted(rejected)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, REJECTED_SCHEMA), sink)
    storage.write_bytes(storage.join(directory, "rejected.parquet"), sink.getvalue())
    _write_remarks(directory, images, len(shards), first_id)
    summary = {
        "num_images": len(images),
        "num_shards": len(shards),
        "num_rejected": len(rejected),
        "seconds": sum(shard.seconds for shard in shards),
    }
    storage.write_json(storage.join(directory, "described.json"), summary)


def read_description(directory: str) -> dict[str, Any] | None:
    """The root's described.json, or None while the description is not finished."""
    try:
        return storage.read_json(storage.join(directory, "described.json"))
    except FileNotFoundError:
        return None


def read_descriptors(directory: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids (n,) and descriptors (n, G) of all shards of a finished description, in the order of ids."""
    num_shards = storage.read_json(storage.join(directory, "described.json"))["num_shards"]
    ids, descriptors = (
        [read_array(storage.join(directory, shard_path(shard), name)) for shard in range(num_shards)] for name in ARRAYS
    )
    return np.concatenate(ids), np.concatenate(descriptors)
