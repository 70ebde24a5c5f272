"""Manifest: a list of photos with what is known about each. Benchmark: database, queries, who matches whom.

A photo's id is its position in the manifest. Paths are relative to the manifest's root and sorted, so ids and
hashes do not depend on where the photos lie.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairvpr.data import storage
from pairvpr.errors import UserError

SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("path", pa.string()),
        ("utm_east_m", pa.float64()),
        ("utm_north_m", pa.float64()),
        ("heading_deg", pa.float64()),
    ]
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@dataclass(frozen=True, eq=False)
class Manifest:
    """Photos below `root` (path or URL), one row of `table` (columns of `SCHEMA`) each; null = not known."""

    root: str
    table: pa.Table

    @classmethod
    def of(
        cls,
        root: str,
        paths: Sequence[str],
        utm_m: NDArray[np.float64] | None = None,
        heading_deg: NDArray[np.float64] | None = None,
    ) -> Manifest:
        """Photos at `paths` (relative to `root`, in the order of their ids); `utm_m` (n, 2) is east, north."""
        num_images = len(paths)
        nulls = pa.nulls(num_images, pa.float64())
        table = pa.table(
            [
                pa.array(np.arange(num_images)),
                pa.array(paths, pa.string()),
                nulls if utm_m is None else pa.array(utm_m[:, 0]),
                nulls if utm_m is None else pa.array(utm_m[:, 1]),
                nulls if heading_deg is None else pa.array(heading_deg),
            ],
            schema=SCHEMA,
        )
        return cls(root, table)

    def __len__(self) -> int:
        return self.table.num_rows

    def path(self, image_id: int) -> str:
        """Path relative to the root."""
        return self.table.column("path")[image_id].as_py()

    def url(self, image_id: int) -> str:
        """Path or URL that can be opened."""
        return storage.join(self.root, self.path(image_id))

    @property
    def paths(self) -> list[str]:
        """All relative paths, in the order of ids."""
        return self.table.column("path").to_pylist()

    @property
    def utm_m(self) -> NDArray[np.float64]:
        """(n, 2) east and north in metres; NaN where not known."""
        columns = [self.table.column(name).to_numpy() for name in ("utm_east_m", "utm_north_m")]
        return np.stack(columns, axis=1).astype(np.float64)

    @cached_property
    def paths_sha256(self) -> str:
        """Digest of the list of paths, each ended by a newline: which photos, in which order."""
        digest = hashlib.sha256()
        for path in self.paths:
            digest.update(path.encode() + b"\n")
        return digest.hexdigest()

    def write(self, url: str) -> None:
        """Publish as Parquet (columns of `SCHEMA`; the root is not part of it)."""
        sink = io.BytesIO()
        pq.write_table(self.table, sink)
        storage.write_bytes(url, sink.getvalue())

    @classmethod
    def read(cls, url: str, root: str) -> Manifest:
        """The manifest that `write` published. Raises `UserError` where columns are missing."""
        table = pq.read_table(io.BytesIO(storage.read_bytes(url)))
        missing = set(SCHEMA.names) - set(table.column_names)
        if missing:
            raise UserError(f"{url}: no column {', '.join(sorted(missing))}; expected {', '.join(SCHEMA.names)}")
        return cls(root, table.select(SCHEMA.names).cast(SCHEMA))


@dataclass(frozen=True, kw_only=True, eq=False)
class Benchmark:
    """One test: which photos are searched, which are asked, and who shows the same place.

    `positives[q]` holds the ids of database photos at the place of query q, ascending; None where there is no
    ground truth. `protocol` says in plain values which test this is.
    """

    name: str
    database: Manifest
    queries: Manifest
    positives: list[NDArray[np.int64]] | None
    protocol: dict[str, object]

    def stamp(self) -> dict[str, object]:
        """What identifies the test: counts, the rule of positives and digests of both path lists."""
        with_positives = None if self.positives is None else sum(len(ids) > 0 for ids in self.positives)
        return {
            "num_queries": len(self.queries),
            "num_queries_with_positives": with_positives,
            "num_queries_without_positives": (None if with_positives is None else len(self.queries) - with_positives),
            "num_database": len(self.database),
            **self.protocol,
            "database_paths_sha256": self.database.paths_sha256,
            "queries_paths_sha256": self.queries.paths_sha256,
        }


def folder_manifest(folder: str, key: str) -> Manifest:
    """All photos below `folder` (path or URL), sorted by relative path, without positions.

    Raises `UserError`, naming the setting `key`, where there is no such folder or no photo in it, where it can't be
    read, and for a name that is not UTF-8.
    """
    root = storage.absolute(folder)
    try:
        paths = [path for path in storage.list_files(root) if path.lower().endswith(IMAGE_SUFFIXES)]
        what = "no photo in it" if paths or storage.exists(root) else "no such folder"
    except OSError as error:
        raise UserError(f"{key}={folder}: can't be read: {storage.reason(error)}") from error
    if not paths:
        raise UserError(f"{key}={folder}: {what}; expected a folder of {', '.join(IMAGE_SUFFIXES)} files")
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            escaped = path.encode(errors="surrogateescape").decode(errors="backslashreplace")
            raise UserError(f"{key}={folder}: the name {escaped} is not UTF-8; expected UTF-8 names") from error
    return Manifest.of(root, paths)


_COORDINATES = re.compile(r"(?:^|/)@(-?\d+(?:\.\d+)?)@(-?\d+(?:\.\d+)?)@[^/]*$")


def positions_from_names(manifest: Manifest, key: str) -> NDArray[np.float64]:
    """(n, 2) UTM east and north in metres from the names `@utm_east@utm_north@...`.

    Raises `UserError`, naming the setting `key` and the first such photo, where a name has no coordinates.
    """
    positions = np.empty((len(manifest), 2))
    for image_id, path in enumerate(manifest.paths):
        match = _COORDINATES.search(path)
        if match is None:
            raise UserError(
                f"{key}: {path} has no coordinates in its name; expected @utm_east@utm_north@... for a radius"
            )
        positions[image_id] = float(match[1]), float(match[2])
    return positions
