"""Manifest: a list of photos with their metadata. Benchmark: database, queries and ground truth.

A photo's id is its position in the manifest. Paths are relative to the manifest's root and sorted, so ids and
hashes do not depend on where the photos are stored.
"""

from __future__ import annotations

import hashlib
import io
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data import sealed, storage
from pairvpr.data.photo_listing import IMAGE_SUFFIXES, photos_among
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError
from pairvpr.secrets import without_secrets
from pairvpr.terminal import say

pc: Any = compute  # its functions are generated at run time, so their types are unknown

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("utm_east_m", pa.float64()),
        ("utm_north_m", pa.float64()),
        ("heading_deg", pa.float64()),
    ]
)
_ZONE = b"utm_epsg"
"""Metadata of a table of photos: the EPSG code of the UTM zone of its metres, where a source in degrees decided it."""
_PATHS_AT_A_TIME = 1 << 16


@dataclass(frozen=True, eq=False)
class Manifest:
    """Photos below `root` (path or URL), one row of `table` (columns of `SCHEMA`) each; null = unknown."""

    root: str
    table: pa.Table

    def __post_init__(self) -> None:
        """Raises `UserError` for a root that contains a secret, because runs record it."""
        if without_secrets(self.root) != self.root:
            raise UserError(
                f"{self.root}: a photo URL can't contain a password, token or query, because runs record it; "
                "expected credentials in the environment or in the storage client's own files"
            )

    @classmethod
    def of(
        cls,
        root: str,
        paths: Sequence[str] | pa.ChunkedArray,
        utm_m: NDArray[np.float64] | None = None,
        heading_deg: NDArray[np.float64] | None = None,
        zone: UtmZone | None = None,
    ) -> Manifest:
        """Photos at `paths` (relative to `root`, in the order of their ids); `utm_m` (n, 2) is east, north in `zone`.

        NaN and None = unknown.
        """
        num_images = len(paths)
        nulls = pa.nulls(num_images, pa.float64())
        table = pa.table(
            [
                pa.array(np.arange(num_images)),
                paths if isinstance(paths, pa.ChunkedArray) else pa.array(paths, pa.string()),
                nulls if utm_m is None else pa.array(utm_m[:, 0], from_pandas=True),
                nulls if utm_m is None else pa.array(utm_m[:, 1], from_pandas=True),
                nulls if heading_deg is None else pa.array(heading_deg, from_pandas=True),
            ],
            schema=SCHEMA,
        )
        return cls(root, table).in_zone(zone)

    def only(self, image_ids: NDArray[np.int64]) -> Manifest:
        """Some of the photos, without positions and with new ids."""
        return Manifest.of(self.root, self.path_column.take(pa.array(image_ids, pa.int64())))

    def take(self, image_ids: NDArray[np.int64]) -> Manifest:
        """Some of the photos, with their positions, headings and zone, and with new ids."""
        taken = self.table.take(pa.array(image_ids, pa.int64()))
        return Manifest(self.root, taken.set_column(0, SCHEMA.field(0), pa.array(np.arange(len(taken)))))

    def with_positions(
        self,
        utm_m: NDArray[np.float64],
        heading_deg: NDArray[np.float64] | None = None,
        zone: UtmZone | None = None,
    ) -> Manifest:
        """The same photos with positions `utm_m` (n, 2) in `zone`, and headings (n,), clockwise from north."""
        return Manifest.of(self.root, self.path_column, utm_m, heading_deg, zone)

    def in_zone(self, zone: UtmZone | None) -> Manifest:
        """The same photos, whose metres are those of `zone`; nothing is projected."""
        metadata = None if zone is None else {_ZONE: str(zone.epsg).encode()}
        return Manifest(self.root, self.table.replace_schema_metadata(metadata))

    @property
    def has_positions(self) -> bool:
        """Whether the position of any photo is known."""
        return self.table.column("utm_east_m").null_count < len(self)

    @property
    def zone(self) -> UtmZone | None:
        """The recorded UTM zone of the metres; None where their source does not state one, and for names, which do."""
        code = (self.table.schema.metadata or {}).get(_ZONE)
        return None if code is None else UtmZone.of_epsg(int(code))

    def __len__(self) -> int:
        return self.table.num_rows

    def path(self, image_id: int) -> str:
        """Path relative to the root."""
        return self.table.column("path")[image_id].as_py()

    def url(self, image_id: int) -> str:
        """Path or URL that can be opened."""
        return storage.join(self.root, self.path(image_id))

    @property
    def path_column(self) -> pa.ChunkedArray:
        """All relative paths, in the order of ids, without a Python text for each."""
        return self.table.column("path")

    @property
    def paths(self) -> list[str]:
        """All relative paths, in the order of ids."""
        return self.path_column.to_pylist()

    def ids_of(self, paths: pa.ChunkedArray) -> NDArray[np.int64]:
        """(n,) ids of the photos at relative `paths` (n,), -1 where there is no such photo."""
        found = pc.index_in(paths, value_set=self.path_column)
        return pc.fill_null(found, -1).to_numpy().astype(np.int64)

    @property
    def heading_deg(self) -> NDArray[np.float64]:
        """(n,) headings in degrees clockwise from north; NaN where unknown."""
        return self.table.column("heading_deg").to_numpy().astype(np.float64)

    @property
    def utm_m(self) -> NDArray[np.float64]:
        """(n, 2) east and north in metres; NaN where unknown."""
        columns = [self.table.column(name).to_numpy() for name in ("utm_east_m", "utm_north_m")]
        return np.stack(columns, axis=1).astype(np.float64)

    @cached_property
    def paths_sha256(self) -> str:
        """Digest of the list of paths, each ended by a newline: which photos, in which order."""
        digest = hashlib.sha256()
        for first in range(0, len(self), _PATHS_AT_A_TIME):
            for path in self.path_column.slice(first, _PATHS_AT_A_TIME).to_pylist():
                digest.update(path.encode() + b"\n")
        return digest.hexdigest()

    def write(self, url: str, first_id: int = 0) -> None:
        """Publish as Parquet (columns of `SCHEMA`; the root is not part of it); ids count from `first_id`."""
        storage.write_bytes(url, self.parquet_bytes(first_id))

    def parquet_bytes(self, first_id: int = 0) -> bytes:
        """The bytes that `write` publishes. The same photos give the same bytes; an index keeps their sha256."""
        sink = io.BytesIO()
        ids = pa.array(np.arange(first_id, first_id + len(self)))
        pq.write_table(self.table.set_column(0, SCHEMA.field(0), ids), sink)
        return sink.getvalue()

    @classmethod
    def read(cls, url: str, root: str) -> Manifest:
        """The manifest published by `write`. Raises `FileNotFoundError`, and as `parse` does."""
        return cls.parse(storage.read_bytes(url), url, root)

    @classmethod
    def parse(cls, data: bytes, url: str, root: str) -> Manifest:
        """The manifest in these bytes, read from `url`.

        Raises `UserError` if it is not a table of photos, or a path points outside the root.
        """
        remedy = "build the index again"
        table = sealed.parse_parquet(data, url, SCHEMA, remedy)
        paths = table.column("path")
        if paths.null_count or pc.any(pc.match_substring_regex(paths, storage.OUTSIDE)).as_py():
            outside = paths.filter(pc.fill_null(pc.match_substring_regex(paths, storage.OUTSIDE), True))[0].as_py()
            raise sealed.DamagedFileError(url, f"the path {outside!r} points outside the photo folder", remedy)
        found = cls(root, table)
        try:
            return found.in_zone(found.zone)
        except ValueError as error:
            raise sealed.DamagedFileError(url, f"no EPSG code of a UTM zone: {error}", remedy) from error


@dataclass(frozen=True, kw_only=True, eq=False)
class Benchmark:
    """One test: database photos, query photos, and which of them show the same place.

    `positives[q]` holds the ids of database photos at the place of query q, ascending; None without ground truth.
    `protocol` identifies the test in plain values.
    """

    name: str
    database: Manifest
    queries: Manifest
    positives: list[NDArray[np.int64]] | None
    protocol: dict[str, object]
    query_groups: Sequence[str] | None = None
    """City of each query, if the benchmark has several."""
    query_kinds: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further groups of the queries by what they go by: `sequence`, and `light` (day or night)."""
    query_subtasks: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    """Ids of the queries of each subtask, ascending; a query may belong to several, or to none."""
    has_submission: bool = False
    """Whether its owners evaluate submitted predictions, which name a photo by the stem of its path."""

    @property
    def groupings(self) -> dict[str, Mapping[str, NDArray[np.int64]]]:
        """Ids of the queries of each group: by `group`, which is the city, by each of the kinds, and by `subtask`."""
        cities = {} if self.query_groups is None else {"group": self.query_groups}
        found = {name: _ids_by_name(its) for name, its in (cities | dict(self.query_kinds)).items()}
        return found | ({"subtask": self.query_subtasks} if self.query_subtasks else {})

    def stamp(self) -> dict[str, object]:
        """Identifies the test: counts, the rule for positives, treatment of queries and photos, digests."""
        with_positives = None if self.positives is None else sum(len(ids) > 0 for ids in self.positives)
        return {
            "num_queries": len(self.queries),
            "num_queries_with_positives": with_positives,
            "num_queries_without_positives": (None if with_positives is None else len(self.queries) - with_positives),
            "num_database": len(self.database),
            "queries_without_positives": None if self.positives is None else "count as a miss",
            "exif_rotation": "applied",
            **self.protocol,
            "database_paths_sha256": self.database.paths_sha256,
            "queries_paths_sha256": self.queries.paths_sha256,
            "positives_sha256": self._positives_sha256,
        }

    @cached_property
    def _positives_sha256(self) -> str | None:
        """Digest of the ground truth: for each query a line with the ids of its positives, separated by spaces."""
        if self.positives is None:
            return None
        digest = hashlib.sha256()
        for ids in self.positives:
            digest.update(" ".join(map(str, ids.tolist())).encode() + b"\n")
        return digest.hexdigest()


def folder_manifest(folder: str, key: str) -> Manifest:
    """All photos below `folder` (path or URL), sorted by relative path, without positions.

    Says how many files of other kinds are there.

    Raises `UserError`, naming the setting `key`, where there is no such folder or no photo in it, where it can't be
    read, and for a name that is not UTF-8 or that no index takes (`storage.is_inside`).
    """
    root = storage.absolute(folder)
    try:
        found = photos_among(storage.list_files(root))
        what = "no photo in it" if found.photos or storage.exists(root) else "no such folder"
    except OSError as error:
        raise UserError(f"{key}={folder}: can't be read: {storage.reason(error)}") from error
    left_out = found.left_out()
    if not found.photos:
        raise UserError(
            f"{key}={folder}: {what}; " + (left_out or f"expected a folder of {', '.join(IMAGE_SUFFIXES)} files")
        )
    if left_out:
        say(f"{key}={folder}: {left_out}")
    for path in found.photos:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            escaped = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise UserError(f"{key}={folder}: the name {escaped} is not UTF-8; expected UTF-8 names") from error
        if not storage.is_inside(path):
            raise UserError(
                f"{key}={folder}: the name {path!r} could stand for a place outside of this folder; expected one "
                "without a drive letter, `..` or `://`, and no slash or backslash in front"
            )
    return Manifest.of(root, found.photos)


def check_photos_are_seen(manifest: Manifest) -> None:
    """Raise `UserError` if this node does not see the photo folder: then the photos are not to blame."""
    if storage.is_local(manifest.root) and not _holds_something(storage.local_path(manifest.root)):
        raise UserError(
            f"{manifest.root}: this photo folder is missing or empty on node {socket.gethostname()}; expected a "
            "folder that every node sees, or a URL"
        )


def _holds_something(folder: Path) -> bool:
    """Whether a folder is not empty; an empty one is most likely a mount point without its mount."""
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _ids_by_name(names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """The places, ascending, at which each name stands, by names in ascending order."""
    found, places = np.unique(np.array(names), return_inverse=True)
    order = np.argsort(places, kind="stable")
    first = np.searchsorted(places[order], np.arange(len(found) + 1))
    return {str(name): order[first[i] : first[i + 1]] for i, name in enumerate(found)}
