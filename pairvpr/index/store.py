"""The index directory: what lies where, and when it counts.

    manifest.json      last to appear: an index without it does not exist
    images.parquet     every photo, rejected ones too; an id is a position here
    rejected.parquet   path and error of every photo that could not be read
    shards/00000/      ids.npy (n,) int64, descriptors.npy (n, G) float32, index.faiss, described.json

`described.json` is the last file of a shard's description, at the root the last of all of them. A directory
of descriptors alone (the queries of a run) has the same files without index.faiss and manifest.json.
The full description of the format is in `docs/formats.md`.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pairvpr.data import claim, storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError

FORMAT_VERSION = 1
REJECTED_SCHEMA = pa.schema([("path", pa.string()), ("error", pa.string())])


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
    """`described.json` of a shard: its range, the photos rejected in it, and what describing it took."""

    first_id: int
    count: int
    num_rows: int
    rejected: dict[int, str]
    seconds: float


@dataclass(frozen=True)
class IndexManifest:
    """`manifest.json`. `shards` has a row for each shard: first_id, count, num_rows, bytes and sha256 by file."""

    model: dict[str, str]
    descriptor_dim: int
    num_images: int
    images_root: str
    shards: list[dict[str, Any]]
    kind: str = "flat"
    factory: str = "Flat"
    metric: str = "L2"
    format_version: int = FORMAT_VERSION


def shard_ranges(num_images: int, num_shards: int) -> list[ShardRange]:
    """Equal contiguous cuts of the ids 0..num_images-1; the first ones may be empty if there are few photos."""
    cuts = [shard * num_images // num_shards for shard in range(num_shards + 1)]
    return [ShardRange(shard, first, stop - first) for shard, (first, stop) in enumerate(itertools.pairwise(cuts))]


def shard_url(directory: str, shard: int, name: str) -> str:
    """Where a shard keeps the file `name`."""
    return storage.join(directory, "shards", f"{shard:05d}", name)


def write_array(url: str, array: NDArray[Any]) -> None:
    """Publish an array as .npy."""
    with storage.written_locally(url) as path, path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(url: str) -> NDArray[Any]:
    """The array of a .npy file: memory-mapped if it is local, else read whole."""
    if storage.is_local(url):
        return np.load(storage.local_path(url), mmap_mode="r", allow_pickle=False)
    return np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)


def write_shard_description(
    directory: str,
    shard: int,
    ids: NDArray[np.int64],
    descriptors: NDArray[np.float32],
    about: ShardDescription,
) -> None:
    """Publish a described shard; its `described.json` comes last."""
    write_array(shard_url(directory, shard, "ids.npy"), ids)
    write_array(shard_url(directory, shard, "descriptors.npy"), descriptors)
    storage.write_json(shard_url(directory, shard, "described.json"), asdict(about))


def read_shard_description(directory: str, shard: int) -> ShardDescription | None:
    """A shard's `described.json`, or None while the shard is not finished."""
    try:
        content = storage.read_json(shard_url(directory, shard, "described.json"))
    except FileNotFoundError:
        return None
    content["rejected"] = {int(image_id): error for image_id, error in content["rejected"].items()}
    return ShardDescription(**content)


def finish_description(directory: str, images: Manifest, shards: list[ShardDescription]) -> None:
    """Publish rejected.parquet and, last, the root's described.json."""
    rejected = {image_id: error for shard in shards for image_id, error in shard.rejected.items()}
    rows = [{"path": images.path(image_id), "error": rejected[image_id]} for image_id in sorted(rejected)]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, REJECTED_SCHEMA), sink)
    storage.write_bytes(storage.join(directory, "rejected.parquet"), sink.getvalue())
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
    ids = [read_array(shard_url(directory, shard, "ids.npy")) for shard in range(num_shards)]
    descriptors = [read_array(shard_url(directory, shard, "descriptors.npy")) for shard in range(num_shards)]
    return np.concatenate(ids), np.concatenate(descriptors)


def write_manifest(directory: str, manifest: IndexManifest) -> None:
    """Publish `manifest.json`: from now on the index exists."""
    storage.write_json(storage.join(directory, "manifest.json"), asdict(manifest))


def read_manifest(directory: str) -> IndexManifest | None:
    """`manifest.json`, or None where there is no finished index.

    Raises `UserError` for a newer format, for what is not the manifest of an index, and for what can't be read.
    """
    url = storage.join(directory, "manifest.json")
    try:
        content = storage.read_json(url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error
    except ValueError as error:
        raise UserError(f"{url} is not the manifest of an index: {storage.reason(error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{url} is not the manifest of an index: expected an object")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{directory}: index format {content.get('format_version')}; this version reads {FORMAT_VERSION}"
        )
    expected = {field.name for field in fields(IndexManifest)}
    if content.keys() != expected:
        wrong = ", ".join(sorted(content.keys() ^ expected))
        raise UserError(f"{url} is not the manifest of an index: missing or unknown {wrong}")
    manifest = IndexManifest(**content)
    if not isinstance(manifest.model, dict) or not {"name", "weights_sha256"} <= manifest.model.keys():
        raise UserError(f"{url} is not the manifest of an index: expected model with name and weights_sha256")
    if not isinstance(manifest.shards, list) or not all(isinstance(row, dict) for row in manifest.shards):
        raise UserError(f"{url} is not the manifest of an index: expected shards as a list of objects")
    return manifest


def read_images(directory: str, manifest: IndexManifest) -> Manifest:
    """The photos of a finished index. Raises `UserError` where `images.parquet` is missing or damaged."""
    url = storage.join(directory, "images.parquet")
    try:
        return Manifest.read(url, manifest.images_root)
    except FileNotFoundError as error:
        raise UserError(f"index {directory}: its images.parquet is missing; build the index again") from error
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{url}: can't be read: {storage.reason(error)}") from error


def check_model(
    directory: str,
    manifest: IndexManifest,
    *,
    name: str,
    weights_sha256: str,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Raise `UserError` unless the index was made by these weights.

    With `model` (section `model` of the settings of a run) also unless its `settings.json`, where there is one, has
    the same network and image size; names and number formats may differ.
    """
    made_by = manifest.model
    if made_by["weights_sha256"] != weights_sha256:
        raise UserError(
            f"index {directory} was made by model {made_by['name']} with weights {made_by['weights_sha256'][:12]}, "
            f"not by {name} with weights {weights_sha256[:12]}; expected the same weights"
        )
    if model is None:
        return
    try:
        settings = storage.read_json(storage.join(directory, claim.FILE))
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"index {directory}: its {claim.FILE} is not readable: {storage.reason(error)}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model"), dict):
        return
    there, here = (
        {key: value for key, value in section.items() if key not in ("name", "precision")}
        for section in (settings["model"], model)
    )
    differences = claim.differences({"model": there}, {"model": here})
    if differences:
        raise UserError(f"index {directory} was made by another network: {'; '.join(differences)}; expected the same")
