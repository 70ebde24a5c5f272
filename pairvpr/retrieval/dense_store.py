"""Stored dense features: the pair decoder's input for each photo, looked up by id and read by byte range.

    settings.json      what made the store (data/claim.py)
    shards/00000/      ids.npy (n,) int64, ascending; records.npy, a fixed-size record per id; crc32.npy
                       (n,) uint32, one per record; shard.json, the last file of a shard
    manifest.json      the settings again, and a row for each shard; the last file of the store

Files are opened by name; no directory listing decides what exists. A checksum covers every byte: each JSON file ends
with the sha256 of its content, the manifest has the sha256 of each shard.json, and that has those of ids.npy and
crc32.npy. `docs/formats.md` describes the format in full.

L patches, D decoder width, n images in a shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.config.schema import ModelConfig, Precision, StoredAs
from pairvpr.data import sealed, storage
from pairvpr.data.images import BrokenImageError
from pairvpr.errors import UserError

T = TypeVar("T")

FORMAT_VERSION = 1
SHARD_BYTES = 100 << 20
READ_AT_ONCE = 16
UNREADABLE = "unreadable.json"
IDS, CRC32, RECORDS, SHARD, MANIFEST = "ids.npy", "crc32.npy", "records.npy", "shard.json", "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OF_PRECISION = {Precision.fp32: "float32", Precision.bf16: "bfloat16", Precision.fp16: "float16"}
_LARGEST_INT8 = 127


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Layout of a record: features (L, D) of type `features`, stored as `values` (float16, bfloat16 or int8)."""

    features: str
    values: str
    num_patches: int
    width: int

    @classmethod
    def of_model(cls, config: ModelConfig, form: StoredAs) -> Layout:
        """The layout of a model's features."""
        features = _OF_PRECISION[config.precision]
        return cls(
            features=features,
            values=_values(features, form),
            num_patches=config.num_patches,
            width=config.decoder.embed_dim,
        )

    @classmethod
    def of(cls, features: Tensor, form: StoredAs) -> Layout:
        """The layout of given features (L, D)."""
        name = next(name for name, dtype in DTYPES.items() if dtype is features.dtype)
        return cls(features=name, values=_values(name, form), num_patches=len(features), width=features.shape[1])

    @property
    def array(self) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """Type and shape of a record in records.npy; bfloat16 values, which numpy lacks, are stored as their bits."""
        shape = (self.num_patches, self.width)
        if self.values == "int8":
            return np.dtype([("scales", "<f4", shape[:1]), ("values", "i1", shape)]), ()
        return np.dtype("<f2" if self.values == "float16" else "<u2"), shape

    @property
    def record_bytes(self) -> int:
        """Size of one record."""
        dtype, shape = self.array
        return dtype.itemsize * int(np.prod(shape, dtype=np.int64))

    @property
    def images_per_shard(self) -> int:
        """Records per shard: as many as fit in `SHARD_BYTES`, at least one."""
        return max(1, SHARD_BYTES // self.record_bytes)

    def head(self, num_records: int) -> bytes:
        """The bytes of records.npy before the first record."""
        dtype, shape = self.array
        sink = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(dtype)
        about = {"descr": descr, "fortran_order": False, "shape": (num_records, *shape)}
        np.lib.format.write_array_header_1_0(sink, about)
        return sink.getvalue()


def _values(features: str, form: StoredAs) -> str:
    if form is StoredAs.int8:
        return "int8"
    return "bfloat16" if features == "bfloat16" else "float16"


def encode(features: Tensor, layout: Layout) -> bytes:
    """The record of features (L, D). 16-bit features are stored exactly; float32 ones are rounded to float16.

    int8 values are divided by their patch's float32 scale, its largest absolute value / 127. Raises `UserError` if
    features are not finite, or float32 ones exceed float16's range.
    """
    assert features.dtype is DTYPES[layout.features]
    assert features.shape == (layout.num_patches, layout.width)
    features = features.cpu()
    if not features.isfinite().all():
        raise UserError("dense features are not finite; expected sound weights and model.precision=fp32 or bf16")
    if layout.values == "int8":
        record = np.empty((), layout.array[0])
        record["scales"], record["values"] = (part.numpy() for part in _quantised(features.float()))
        return record.tobytes()
    half = features.to(DTYPES[layout.values])
    if not half.isfinite().all():
        raise UserError(
            f"dense features reach {features.abs().max().item():g}, beyond float16's {torch.finfo(half.dtype).max:g}; "
            "expected rerank.stored_as=int8, model.precision=bf16, or rerank.dense_features=cache"
        )
    return half.contiguous().view(torch.int16).numpy().tobytes()


def _quantised(features: Tensor) -> tuple[Tensor, Tensor]:
    """Scales (L,) float32 and values (L, D) int8 of features (L, D) float32."""
    scales = features.abs().amax(dim=1) / _LARGEST_INT8
    divisors = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (features / divisors[:, None]).round().clamp(-_LARGEST_INT8, _LARGEST_INT8)
    return scales, values.to(torch.int8)


def decode(record: bytes, layout: Layout) -> Tensor:
    """The features (L, D) of a record, in their original type, on the CPU."""
    if layout.values == "int8":
        array = np.frombuffer(record, layout.array[0])[0]
        scales, values = (torch.from_numpy(array[name].astype(np.float32)) for name in ("scales", "values"))
        return (values * scales[:, None]).to(DTYPES[layout.features])
    half = torch.frombuffer(bytearray(record), dtype=DTYPES[layout.values])
    return half.view(layout.num_patches, layout.width).to(DTYPES[layout.features])


def as_stored(features: Tensor, form: StoredAs) -> Tensor:
    """Features (L, D) as they would come back from a store, on the same device. Raises as `encode` does."""
    layout = Layout.of(features, form)
    return decode(encode(features, layout), layout).to(features.device)


@dataclass(frozen=True, kw_only=True)
class DenseShard:
    """`shard.json`: `num_records` images, and the checksums of the files next to it.

    The first record is at `records_offset` of records.npy; `head_crc32` covers the bytes before it.
    """

    layout: Layout
    num_records: int
    record_bytes: int
    records_offset: int
    head_crc32: int
    ids_sha256: str
    crc32_sha256: str
    format_version: int = FORMAT_VERSION

    @property
    def records_file_bytes(self) -> int:
        """Size of records.npy."""
        return self.records_offset + self.num_records * self.record_bytes


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """A shard in the manifest: `count` images with ids `first_id` to `last_id`, and the sha256 of its shard.json."""

    first_id: int
    last_id: int
    count: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """`manifest.json` of a complete store; shard i of `shards` is in `shard_path(i)`."""

    settings: dict[str, Any]
    layout: Layout
    num_images: int
    shards: list[ShardRow]
    format_version: int = FORMAT_VERSION


def shard_path(shard: int) -> str:
    """A shard's path, relative to the store."""
    return f"shards/{shard:05d}"


def cut(ids: NDArray[np.int64], layout: Layout) -> list[NDArray[np.int64]]:
    """Ascending ids (n,) divided into shards."""
    return [ids[first : first + layout.images_per_shard] for first in range(0, len(ids), layout.images_per_shard)]


def write_shard(
    store: str,
    shard: int,
    ids: NDArray[np.int64],
    layout: Layout,
    features: Iterable[Tensor],
    unreadable: Callable[[], Mapping[int, str]] = dict,
) -> None:
    """Publish a shard, shard.json last; `features` yields the features (L, D) of each id, in order.

    `unreadable` is called after the last of them; it gives the reasons for images whose photo can't be read and whose
    features are placeholders. A file next to the records keeps these reasons.

    Records are first written to a local file (a temporary one for a remote store), so only one is in memory at a time.
    The same ids and features give the same bytes. Two kinds of GPU round differently: a shard that another attempt
    finished meanwhile is left as it is. Raises `UserError` as `encode` does, with the id.
    """
    directory = storage.join(store, shard_path(shard))
    head = layout.head(len(ids))
    try:
        with storage.written_locally(storage.join(directory, RECORDS)) as local:
            crc32 = _write_records(local, head, ids, layout, features)
            if read_row(store, shard, ids, layout) is not None:
                raise _FinishedMeanwhileError
    except _FinishedMeanwhileError:
        return
    named = {str(image_id): reason for image_id, reason in sorted(unreadable().items()) if image_id in ids}
    if named:
        sealed.write_json(storage.join(directory, UNREADABLE), named)
    else:
        storage.remove_file(storage.join(directory, UNREADABLE))
    tables = {IDS: _npy(ids), CRC32: _npy(crc32)}
    for name, data in tables.items():
        storage.write_bytes(storage.join(directory, name), data)
    about = DenseShard(
        layout=layout,
        num_records=len(ids),
        record_bytes=layout.record_bytes,
        records_offset=len(head),
        head_crc32=zlib.crc32(head),
        ids_sha256=_sha256(tables[IDS]),
        crc32_sha256=_sha256(tables[CRC32]),
    )
    storage.write_bytes(storage.join(directory, SHARD), _sealed(asdict(about)))


class _FinishedMeanwhileError(Exception):
    """Another attempt at the same shard was faster."""


def _write_records(
    path: Path, head: bytes, ids: NDArray[np.int64], layout: Layout, features: Iterable[Tensor]
) -> NDArray[np.uint32]:
    """Checksums (n,) of the records."""
    crc32 = np.empty(len(ids), np.uint32)
    with path.open("wb") as file:
        file.write(head)
        for row, of_an_image in enumerate(features):
            try:
                record = encode(of_an_image, layout)
            except UserError as error:
                raise UserError(f"image {ids[row]}: {error}") from error
            crc32[row] = zlib.crc32(record)
            file.write(record)
        assert file.tell() == len(head) + len(ids) * layout.record_bytes, "features of all ids are expected"
    return crc32


def read_row(store: str, shard: int, ids: NDArray[np.int64], layout: Layout) -> ShardRow | None:
    """The manifest row of the shard with these ids, or None if it is not finished.

    Raises `UserError` if its shard.json is damaged, or describes other images or another layout.
    """
    url = storage.join(store, shard_path(shard), SHARD)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        return None
    about = _shard(data, url)
    if about.layout != layout or about.ids_sha256 != _sha256(_npy(ids)):
        raise UserError(f"{url}: this shard has other images or another layout; expected a separate directory")
    return ShardRow(first_id=int(ids[0]), last_id=int(ids[-1]), count=len(ids), sha256=_sha256(data))


def read_rows(store: str, shards: Sequence[NDArray[np.int64]], layout: Layout) -> list[ShardRow | None]:
    """`read_row` for all shards, concurrently."""
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        return list(pool.map(lambda shard: read_row(store, shard, shards[shard], layout), range(len(shards))))


def finish(store: str, shards: Sequence[NDArray[np.int64]], layout: Layout, settings: Mapping[str, Any]) -> None:
    """Publish the manifest, once all shards with these ids exist."""
    rows = [row for row in read_rows(store, shards, layout) if row is not None]
    assert len(rows) == len(shards), "a shard is missing"
    num_images = sum(row.count for row in rows)
    manifest = StoreManifest(settings=dict(settings), layout=layout, num_images=num_images, shards=rows)
    storage.write_bytes(storage.join(store, MANIFEST), _sealed(asdict(manifest)))


def read_manifest(store: str) -> StoreManifest | None:
    """The manifest of a complete store, or None. Raises `UserError` if it is damaged or of a later format."""
    url = storage.join(store, MANIFEST)
    try:
        data = storage.read_bytes(url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error
    content = _unsealed(data, url, StoreManifest)
    content["layout"] = Layout(**content["layout"])
    content["shards"] = [ShardRow(**row) for row in content["shards"]]
    return StoreManifest(**content)


@dataclass(frozen=True)
class _Table:
    """A checked shard: ids and crc32 (n,), and the reasons for unreadable photos, by id."""

    ids: NDArray[np.int64]
    crc32: NDArray[np.uint32]
    about: DenseShard
    unreadable: dict[int, str]


class DenseStore:
    """A complete store, open for reading; several threads may share it.

    A shard's tables are read and checked on first use.
    """

    def __init__(self, url: str, manifest: StoreManifest) -> None:
        self.url = url
        self.manifest = manifest
        self._first_ids = [row.first_id for row in manifest.shards]
        self._tables: dict[int, _Table] = {}

    @classmethod
    def open(cls, url: str) -> DenseStore:
        """The store in a directory (path or URL). Raises `UserError` if there is none, and as `read_manifest` does."""
        manifest = read_manifest(url)
        if manifest is None:
            raise UserError(f"{url}: no finished store of dense features there; expected a directory with {MANIFEST}")
        return cls(url, manifest)

    def read(self, image_id: int) -> Tensor:
        """Features (L, D) of an image, on the CPU; only the record's own bytes are read.

        Raises `BrokenImageError` if its photo could not be read, and `UserError`, naming shard and file, if
        anything differs from what was written or the store has no such image.
        """
        shard = bisect_right(self._first_ids, image_id) - 1
        table = self._table(shard) if shard >= 0 else None
        row = 0 if table is None else int(np.searchsorted(table.ids, image_id))
        if table is None or row == len(table.ids) or table.ids[row] != image_id:
            raise UserError(f"{self.url}: this store of dense features has no image {image_id}; expected another store")
        if image_id in table.unreadable:
            raise BrokenImageError(table.unreadable[image_id])
        url, size = self._file(shard, RECORDS), table.about.record_bytes
        first = table.about.records_offset + row * size
        record = _found(url, lambda: storage.read_ranges(url, [(first, first + size)])[0])
        if len(record) != size or zlib.crc32(record) != table.crc32[row]:
            raise _damaged(url)
        return decode(record, self.manifest.layout)

    def check(self) -> None:
        """Read the tables of all shards, concurrently. Raises `UserError` as `read` does."""
        with ThreadPoolExecutor(READ_AT_ONCE) as pool:
            list(pool.map(self._table, range(len(self._first_ids))))

    def missing(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The `ids` (n,) that are not in the store. Raises `UserError` as `read` does."""
        self.check()
        held = [self._tables[shard].ids for shard in range(len(self._first_ids))]
        return np.setdiff1d(ids, np.concatenate([np.empty(0, np.int64), *held]))

    def _file(self, shard: int, name: str) -> str:
        return storage.join(self.url, shard_path(shard), name)

    def _table(self, shard: int) -> _Table:
        if shard not in self._tables:
            self._tables[shard] = self._read_table(shard)
        return self._tables[shard]

    def _read_table(self, shard: int) -> _Table:
        row, url = self.manifest.shards[shard], self._file(shard, SHARD)
        about = _shard(self._checked_sha256(url, row.sha256), url)
        ids = _rows(self._checked_sha256(self._file(shard, IDS), about.ids_sha256), "<i8")
        crc32 = _rows(self._checked_sha256(self._file(shard, CRC32), about.crc32_sha256), "<u4")
        url = self._file(shard, RECORDS)
        head = _found(url, lambda: storage.read_head(url, about.records_offset))
        size = _found(url, lambda: storage.size_bytes(url))
        if zlib.crc32(head) != about.head_crc32 or size != about.records_file_bytes:
            raise _damaged(url)
        named = sealed.read_json(self._file(shard, UNREADABLE), "delete the store and run the same command again")
        return _Table(ids, crc32, about, {int(image_id): reason for image_id, reason in (named or {}).items()})

    def _checked_sha256(self, url: str, sha256: str) -> bytes:
        data = _found(url, lambda: storage.read_bytes(url))
        if _sha256(data) != sha256:
            raise _damaged(url)
        return data


def _found(url: str, read: Callable[[], T]) -> T:
    """The content of the file. Raises `UserError` if it is missing."""
    try:
        return read()
    except FileNotFoundError as error:
        raise _damaged(url, "missing") from error


def _damaged(url: str, what: str = "damaged") -> UserError:
    return UserError(
        f"{url}: {what}; delete its folder and the store's {MANIFEST}, then run the command that filled the store again"
    )


def _shard(data: bytes, url: str) -> DenseShard:
    content = _unsealed(data, url, DenseShard)
    content["layout"] = Layout(**content["layout"])
    return DenseShard(**content)


def _sealed(content: dict[str, Any]) -> bytes:
    """JSON that ends with its own sha256 (of the JSON without this entry)."""
    return storage.json_bytes(content | {"sha256": _sha256(storage.json_bytes(content))})


def _unsealed(data: bytes, url: str, of: type) -> dict[str, Any]:
    """The object written by `_sealed`. Raises `UserError` if a byte has changed or the format is later."""
    try:
        content = json.loads(data)
        version = content["format_version"]
        del content["sha256"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(url) from error
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{url}: dense features stored in format {version}; this version reads format {FORMAT_VERSION}, "
            "a newer one reads it"
        )
    if _sealed(content) != data or content.keys() != {item.name for item in fields(of)}:
        raise _damaged(url)
    return content


def _npy(array: NDArray[Any]) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, allow_pickle=False)
    return sink.getvalue()


def _rows(npy: bytes, dtype: str) -> NDArray[Any]:
    """The array (n,) written by `_npy`. numpy's own reader parses the header as Python, which is not thread-safe before
    Python 3.11.5."""
    (head_bytes,) = struct.unpack_from("<H", npy, offset=8)
    return np.frombuffer(npy, dtype, offset=10 + head_bytes)


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
