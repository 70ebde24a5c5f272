"""Described shards: descriptors of photos on storage, from which an index is built.

    images.parquet     every photo, including rejected ones; an id is a position here
    rejected.parquet   path and error of every photo that could not be read
    remarks.parquet    path and remark of every photo that is readable but odd; only if there are any
    shards/00000/      ids.npy (n,) int64, descriptors.npy (n, G) float32, described.json

`described.json` is the last file of a shard's description, at the root the last of all of them. The queries of a run
are such a directory; an index has faiss files and a manifest beside it (`generations.py`). The full description of the
format is in `docs/formats.md`.
"""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pairvpr.data import sealed, storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index.generations import REMEDY, StoredFile, read_checked

T = TypeVar("T", bound=np.generic)

REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("error", pa.string())])
REMARKS = "remarks.parquet"
REJECTED = "rejected.parquet"
REMARKS_SCHEMA = pa.schema([("path", pa.string()), ("remark", pa.string())])
READ_AT_ONCE = 16
ARRAYS = ("ids.npy", "descriptors.npy")
SAME_LINE = "run the same command again"
DESCRIBED_ANEW = "delete it and run the same command again to describe its photos"
_MOST_HEADER_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Description:
    """The root's `described.json`: numbers of photos, shards and unreadable photos, seconds of work."""

    num_images: int
    num_shards: int
    num_rejected: int
    seconds: float


@dataclass(frozen=True)
class ShardRange:
    """The contiguous ids [first_id, first_id + count) of a shard, including rejected photos."""

    shard: int
    first_id: int
    count: int

    @property
    def stop_id(self) -> int:
        """One past the last id."""
        return self.first_id + self.count


@dataclass(frozen=True)
class ShardDescription:
    """`described.json` of a shard: its range, its rejected photos, the seconds spent, and its files.

    Ids are the index's ids, which continue those of earlier generations.
    """

    first_id: int
    count: int
    num_rows: int
    rejected: dict[int, str]
    seconds: float
    files: dict[str, StoredFile]


def shard_ranges(num_images: int, num_shards: int) -> list[ShardRange]:
    """Split the ids 0..num_images-1 into equal contiguous ranges; the first may be empty if there are few photos."""
    cuts = [shard * num_images // num_shards for shard in range(num_shards + 1)]
    return [ShardRange(shard, first, stop - first) for shard, (first, stop) in enumerate(itertools.pairwise(cuts))]


def shard_path(shard: int) -> str:
    """The path of a described shard, relative to its directory."""
    return f"shards/{shard:05d}"


def write_array(directory: str, path: str, array: NDArray[Any]) -> StoredFile:
    """Publish an array as .npy; returns its size and digest, computed before the upload."""
    with storage.written_locally(storage.join(directory, path)) as local:
        with local.open("wb") as file:
            np.save(file, array, allow_pickle=False)
        return StoredFile(path=path, bytes=local.stat().st_size, sha256=storage.sha256(str(local)))


def load_array(
    file: str | Path | IO[bytes], dtype: type[T], num_axes: int, url: str, mmap_mode: Literal["r"] | None = None
) -> NDArray[T]:
    """The array in a .npy file with checked bytes. Raises `UserError`, naming `url`, for another type or shape."""
    try:
        array = np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise UserError(f"{url}: not an array: {storage.reason(error)}; {REMEDY}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != num_axes:
        raise UserError(f"{url}: not an array of {dtype.__name__} with {num_axes} axes; {REMEDY}")
    return array


def read_checked_array(directory: str, file: StoredFile, dtype: type[T], num_axes: int) -> NDArray[T]:
    """The array in a .npy file, in memory. Raises `UserError`, naming it, if it is missing or has changed."""
    return load_array(io.BytesIO(read_checked(directory, file)), dtype, num_axes, storage.join(directory, file.path))


def read_some_rows(url: str, runs: Sequence[range]) -> NDArray[np.float32]:
    """Some rows of a .npy file of float32 (n, G), run by run; only these bytes are read.

    They are not checked against a digest: the caller must have checked the file.
    """
    if storage.is_local(url):
        rows = load_array(storage.local_path(url), np.float32, 2, url, mmap_mode="r")
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
    return _finish_shard(
        directory,
        shard,
        ids,
        write_array(directory, f"{shard_path(shard)}/descriptors.npy", descriptors),
        first_id=first_id,
        count=count,
        rejected=rejected,
        seconds=seconds,
    )


def write_shard_rows(
    directory: str,
    shard: int,
    ids: NDArray[np.int64],
    descriptor_dim: int,
    pieces: Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]],
    *,
    first_id: int,
    count: int,
    rejected: dict[int, str],
) -> ShardDescription:
    """`write_shard_description` of rows that come in pieces and are never all in memory.

    A piece is places (k,) among the ids and finite rows (k, G); together they have each place once.
    """
    started_s = time.perf_counter()
    path = f"{shard_path(shard)}/descriptors.npy"
    with storage.written_locally(storage.join(directory, path)) as local:
        with local.open("wb") as file:
            head = {"descr": "<f4", "fortran_order": False, "shape": (len(ids), descriptor_dim)}
            np.lib.format.write_array_header_1_0(file, head)
            offset, row_bytes = file.tell(), 4 * descriptor_dim
            for places, rows in pieces:
                order = np.argsort(places)
                runs = np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1)
                for run in runs:
                    file.seek(offset + int(places[run[0]]) * row_bytes)
                    file.write(np.ascontiguousarray(rows[run], "<f4").data)
            file.truncate(offset + len(ids) * row_bytes)
        written = StoredFile(path=path, bytes=local.stat().st_size, sha256=storage.sha256(str(local)))
    seconds = time.perf_counter() - started_s
    return _finish_shard(
        directory, shard, ids, written, first_id=first_id, count=count, rejected=rejected, seconds=seconds
    )


def _finish_shard(
    directory: str,
    shard: int,
    ids: NDArray[np.int64],
    descriptors: StoredFile,
    *,
    first_id: int,
    count: int,
    rejected: dict[int, str],
    seconds: float,
) -> ShardDescription:
    """Publish the ids and, last, the description of a shard whose descriptors are on storage."""
    files = {"ids.npy": write_array(directory, f"{shard_path(shard)}/ids.npy", ids), "descriptors.npy": descriptors}
    about = ShardDescription(first_id, count, len(ids), rejected, seconds, files)
    sealed.write_json(_described_url(directory, shard), asdict(about))
    return about


def _described_url(directory: str, shard: int) -> str:
    return storage.join(directory, shard_path(shard), "described.json")


def remove_shard_description(directory: str, shard: int) -> None:
    """Mark a shard as not described."""
    storage.remove_file(_described_url(directory, shard))


def read_shard_description(directory: str, shard: int) -> ShardDescription | None:
    """A shard's `described.json`, or None if the shard is not finished. Raises `UserError` if it is damaged."""
    url = _described_url(directory, shard)
    content = sealed.read_json(url, DESCRIBED_ANEW)
    if content is None:
        return None
    about = sealed.parsed(ShardDescription, content, url, DESCRIBED_ANEW)
    paths = {name: file.path for name, file in about.files.items()}
    if paths != {name: f"{shard_path(shard)}/{name}" for name in ARRAYS}:
        raise sealed.DamagedFileError(url, "it belongs to another shard", DESCRIBED_ANEW)
    if about.num_rows + len(about.rejected) != about.count:
        raise sealed.DamagedFileError(url, "its numbers of photos do not add up", DESCRIBED_ANEW)
    return about


def write_shard_remarks(directory: str, shard: int, remarks: dict[int, str]) -> None:
    """Publish the remarks on a shard's photos, by image id, before its description."""
    sealed.write_json(_remarks_url(directory, shard), {str(image_id): remark for image_id, remark in remarks.items()})


def _remarks_url(directory: str, shard: int) -> str:
    return storage.join(directory, shard_path(shard), "remarks.json")


def _write_remarks(directory: str, images: Manifest, num_shards: int, first_id: int) -> None:
    """Publish remarks.parquet for all shards, if there are remarks."""
    urls = [_remarks_url(directory, shard) for shard in range(num_shards)]
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        found = pool.map(lambda url: sealed.read_json(url, "delete it, remarks are for people"), urls)
    remarks = {int(image_id): remark for its in found for image_id, remark in (its or {}).items()}
    if remarks:
        rows = [{"path": images.path(image_id - first_id), "remark": remarks[image_id]} for image_id in sorted(remarks)]
        sealed.write_parquet(storage.join(directory, REMARKS), pa.Table.from_pylist(rows, REMARKS_SCHEMA))


def read_remarks(directory: str) -> list[tuple[str, str]]:
    """Path and remark of every photo with a remark in a description."""
    url = storage.join(directory, REMARKS)
    table = sealed.read_parquet(url, REMARKS_SCHEMA, "delete it, remarks are for people")
    return [] if table is None else [(row["path"], row["remark"]) for row in table.to_pylist()]


def about_photos(directory: str) -> list[str]:
    """What is to be said of the photos of a finished description: how many can't be read, and which are odd.

    A line for the rejected ones and for each kind of remark (what stands before its colon), with the first photo.
    """
    lines, rejected = list[str](), read_rejected(directory)
    if len(rejected):
        first, url = rejected.slice(0, 1).to_pylist()[0], storage.join(directory, REJECTED)
        lines.append(f"{len(rejected):,} photos can't be read: {first['error']} ({first['path']}; all in {url})")
    kinds: dict[str, list[tuple[str, str]]] = {}
    for path, remark in read_remarks(directory):
        kinds.setdefault(remark.split(":")[0], []).append((path, remark))
    url = storage.join(directory, REMARKS)
    return lines + [f"{len(rows):,} photos: {rows[0][1]} ({rows[0][0]}; all in {url})" for rows in kinds.values()]


def finish_description(directory: str, images: Manifest, shards: list[ShardDescription], first_id: int = 0) -> None:
    """Publish rejected.parquet and, last, the root's described.json; `first_id` is the id of the first photo."""
    rejected = {image_id: error for shard in shards for image_id, error in shard.rejected.items()}
    rows = [{"path": images.path(image_id - first_id), "error": rejected[image_id]} for image_id in sorted(rejected)]
    sealed.write_parquet(storage.join(directory, REJECTED), pa.Table.from_pylist(rows, REJECTED_SCHEMA))
    _write_remarks(directory, images, len(shards), first_id)
    summary = Description(
        num_images=len(images),
        num_shards=len(shards),
        num_rejected=len(rejected),
        seconds=float(sum(shard.seconds for shard in shards)),
    )
    sealed.write_json(storage.join(directory, "described.json"), asdict(summary))


def read_description(directory: str) -> Description | None:
    """The root's described.json, or None until everything is described. Raises `UserError` if it is damaged."""
    url, remedy = storage.join(directory, "described.json"), "delete it and run the same command again"
    content = sealed.read_json(url, remedy)
    return None if content is None else sealed.parsed(Description, content, url, remedy)


def read_rejected(directory: str) -> pa.Table:
    """The columns of `REJECTED_SCHEMA` of a finished description. Raises `UserError` for a damaged file."""
    url, remedy = storage.join(directory, REJECTED), f"delete {directory}/described.json; {SAME_LINE}"
    table = sealed.read_parquet(url, REJECTED_SCHEMA, remedy)
    if table is None:
        raise sealed.DamagedFileError(url, "it is missing", remedy)
    return table


def read_descriptors(directory: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids (n,) and descriptors (n, G) of all shards of a finished description, in id order, in memory.

    Raises `UserError`, naming the file, if one is missing or its bytes have changed.
    """
    description = read_description(directory)
    shards = [read_shard_description(directory, shard) for shard in range(description.num_shards if description else 0)]
    if not shards or None in shards:
        raise UserError(f"{directory}: some of its photos are not described; {SAME_LINE}")
    files = [about.files for about in shards if about is not None]
    ids = [read_checked_array(directory, its["ids.npy"], np.int64, 1) for its in files]
    rows = [read_checked_array(directory, its["descriptors.npy"], np.float32, 2) for its in files]
    if [len(part) for part in ids] != [len(part) for part in rows]:
        raise UserError(f"{directory}: different numbers of ids and descriptors; delete it and {SAME_LINE}")
    return np.concatenate(ids), np.concatenate(rows)
