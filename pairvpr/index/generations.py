"""`manifest.json`: the files of an index, and its generations.

Each change of an index is a new generation: a complete manifest, `generations/000001.json` and so on, which is created
only if no other writer has created that generation. `manifest.json` is a copy of the newest one; if a writer died
before copying it, readers find the next generation by its name. A generation and the files it lists never change, so
readers can keep using the one they opened.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa

from pairvpr.config.schema import IndexKind
from pairvpr.data import claim, sealed, storage
from pairvpr.data.local_cache import damaged
from pairvpr.data.manifest import SCHEMA, Manifest
from pairvpr.errors import UserError

FORMAT_VERSION = 2
REMEDY = "restore it, or delete the index and build it again"


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of the index: its path in the directory, its size and its digest."""

    path: str
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        """Raises `ValueError` for a path outside the directory, and for an invalid digest."""
        if not storage.is_inside(self.path):
            raise ValueError(f"the path {self.path!r} points outside the directory")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"{self.sha256!r} is not a sha256")


@dataclass(frozen=True, kw_only=True)
class ImageTable:
    """The photos with ids [first_id, first_id + count): a Parquet file of their paths and positions."""

    file: StoredFile
    first_id: int
    count: int


@dataclass(frozen=True, kw_only=True)
class ShardEntry:
    """A shard for ids [first_id, first_id + count), of which `num_rows` have descriptors; `files` by name.

    `num_removed` rows belong to photos that were removed later.
    """

    path: str
    first_id: int
    count: int
    num_rows: int
    num_removed: int
    files: dict[str, StoredFile]


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """The file of the reduction of an index's descriptors, and how many values they had before."""

    file: StoredFile
    descriptor_dim: int


@dataclass(frozen=True, kw_only=True)
class IndexManifest:
    """One generation of an index; every path in it is relative to the index directory.

    `images` and `shards` cover the ids 0..num_images-1 in order. `removed` are .npy files of ids (int64, ascending).
    `trained` is the empty index whose centroids and codes all shards share; `effort` is its default search effort, and
    `measured` the recall at that effort.
    """

    generation: int
    model: dict[str, str]
    descriptor_dim: int
    kind: str
    factory: str
    num_images: int
    num_rejected: int
    num_removed: int
    images_root: str
    images: list[ImageTable]
    removed: list[StoredFile]
    shards: list[ShardEntry]
    trained: StoredFile | None = None
    effort: dict[str, int] = field(default_factory=dict)
    measured: dict[str, Any] | None = None
    reduction: Reduced | None = None
    metric: str = "L2"
    format_version: int = FORMAT_VERSION

    def check(self) -> None:
        """Raise `ValueError` if the entries are inconsistent."""
        IndexKind(self.kind)
        if not re.fullmatch(r"(IVF\d{1,9},)?[A-Za-z0-9]+", self.factory):
            raise ValueError(f"{self.factory!r} is not a factory string of faiss")
        if not {"name", "weights_sha256"} <= self.model.keys():
            raise ValueError("expected model with name and weights_sha256")
        if not self.effort.keys() <= {"num_probes", "num_rescored"}:
            raise ValueError("expected effort with num_probes and num_rescored")
        if self.measured is not None and not {"target_recall", "recall"} <= self.measured.keys():
            raise ValueError("expected measured with target_recall and recall")
        for name, entries in (("images", self.images), ("shards", self.shards)):
            stops = [0, *accumulate(entry.count for entry in entries)]
            if [entry.first_id for entry in entries] != stops[:-1] or stops[-1] != self.num_images:
                raise ValueError(f"{name} do not cover the ids 0 to {self.num_images - 1} in order")
        for entry in self.shards:
            if not entry.num_removed <= entry.num_rows <= entry.count or not storage.is_inside(entry.path):
                raise ValueError(f"shard {entry.path!r}: {entry.num_rows} rows of {entry.count} photos")
            if not {"ids.npy", "descriptors.npy"} <= entry.files.keys():
                raise ValueError(f"shard {entry.path!r}: expected ids.npy and descriptors.npy")

    @property
    def described_dim(self) -> int:
        """Values of a descriptor before it is reduced, if it is."""
        return self.descriptor_dim if self.reduction is None else self.reduction.descriptor_dim

    @property
    def reduced_to(self) -> int | None:
        """Values of a reduced descriptor; None where they are indexed as they were described."""
        return None if self.reduction is None else self.descriptor_dim

    @property
    def num_updates(self) -> int:
        """How often photos were added or removed."""
        return len(self.images) - 1 + len(self.removed)

    @property
    def num_live(self) -> int:
        """Photos that a search can find."""
        return sum(entry.num_rows - entry.num_removed for entry in self.shards)


def commit(directory: str, manifest: IndexManifest) -> None:
    """Publish a generation, which becomes the current state of the index.

    Repeating it is harmless. Raises `UserError` if another writer published this generation first.
    """
    content = asdict(manifest)
    if manifest.reduction is None:
        del content["reduction"]  # as before there were any
    data = sealed.json_bytes(content)
    url = generation_url(directory, manifest.generation)
    if not storage.create_exclusively(url, data) and _read(url, directory) != manifest:
        raise changed_meanwhile(directory, manifest.generation)
    storage.write_bytes(storage.join(directory, "manifest.json"), data)


def changed_meanwhile(directory: str, generation: int) -> UserError:
    """The error when another writer has published `generation` in the meantime."""
    return UserError(
        f"{directory}: another writer has changed the index in the meantime (generation {generation}); nothing is "
        "lost: run the same command again to apply this change on top of it"
    )


def read_checked(directory: str, file: StoredFile) -> bytes:
    """Read a small file of the index. Raises `UserError`, naming it, if it is missing or its bytes have changed."""
    url = storage.join(directory, file.path)
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError as error:
        raise UserError(f"{url} is missing; build the index again") from error
    except OSError as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise damaged(url)
    return data


def generation_url(directory: str, generation: int) -> str:
    """The URL of a generation's manifest."""
    return storage.join(directory, "generations", f"{generation:06d}.json")


def read_generation(directory: str, generation: int) -> IndexManifest | None:
    """One generation, or None if there is none with this number. Raises as `read_manifest` does."""
    return _read(generation_url(directory, generation), directory)


def read_manifest(directory: str) -> IndexManifest | None:
    """The newest generation, or None if there is no finished index.

    Raises `UserError` for another format, for anything but the manifest of an index, and if it can't be read.
    """
    manifest = _read(storage.join(directory, "manifest.json"), directory) or _read(
        generation_url(directory, 1), directory
    )
    following = manifest
    while following is not None:
        manifest = following
        following = _read(generation_url(directory, manifest.generation + 1), directory)
    return manifest


def _read(url: str, directory: str) -> IndexManifest | None:
    content = sealed.read_json(url, REMEDY)
    if content is None:
        return None
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        advice = (
            "a newer pairvpr reads it" if isinstance(version, int) and version > FORMAT_VERSION else "build it again"
        )
        raise UserError(f"{directory}: index format {version}; this version reads {FORMAT_VERSION}; {advice}")
    content.setdefault("reduction", None)  # only an index that has one says so
    manifest = sealed.parsed(IndexManifest, content, url, REMEDY)
    try:
        manifest.check()
    except ValueError as error:
        raise sealed.DamagedFileError(url, storage.reason(error), REMEDY) from error
    return manifest


def read_images(directory: str, manifest: IndexManifest) -> Manifest:
    """All photos of a generation, including removed and rejected ones; an id is a position.

    Raises `UserError` if a table is missing or damaged.
    """
    tables, zones = [], []
    for part in manifest.images:
        url = storage.join(directory, part.file.path)
        photos = Manifest.parse(read_checked(directory, part.file), url, manifest.images_root)
        if len(photos) != part.count:
            raise UserError(
                f"{url}: {len(photos):,} photos, but the manifest has {part.count:,}; build the index again"
            )
        tables.append(photos.table.replace_schema_metadata(None))
        if photos.has_positions:
            zones.append(photos.zone)
            if photos.zone != zones[0]:
                raise UserError(f"{url}: its metres are of another UTM zone than the index's; build the index again")
    together = pa.concat_tables(tables)
    ids = pa.array(np.arange(len(together)))
    images = Manifest(manifest.images_root, together.set_column(0, SCHEMA.field(0), ids))
    return images.in_zone(zones[0] if zones else None)


def check_model(
    directory: str,
    manifest: IndexManifest,
    *,
    name: str,
    weights_sha256: str,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Raise `UserError` unless the index was made by these weights.

    With `settings` (those of a first stage) also unless its `settings.json`, where there is one, has the same network
    and photos; names and number formats of Pair-VPR's may differ. Rows of files have no weights.
    """
    made_by = manifest.model
    if made_by["weights_sha256"] != weights_sha256:
        there, here = (
            f"{its_name} and weights {sha256[:12]}" if sha256 else f"{its_name} of a file"
            for its_name, sha256 in ((made_by["name"], made_by["weights_sha256"]), (name, weights_sha256))
        )
        raise UserError(
            f"index {directory} was made with {'model ' if made_by['weights_sha256'] else ''}{there}, not with {here}; "
            "expected the same weights"
        )
    if settings is None:
        return
    made_with = sealed.read_json(storage.join(directory, claim.FILE), REMEDY) or {}
    both = [name for name in ("model", "descriptor") if name in settings and isinstance(made_with.get(name), dict)]
    differences = claim.differences(
        {name: made_with[name] for name in both},
        {name: settings[name] for name in both},
        ignored=("model.name", "model.precision"),
    )
    if differences:
        raise UserError(f"index {directory} was made with another network: {'; '.join(differences)}; expected the same")
