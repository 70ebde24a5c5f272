"""An open generation of an index: its photos, where they were taken, and the network that described them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pairvpr.config.networks import named_network, network_names, network_of_settings
from pairvpr.config.schema import ModelConfig
from pairvpr.data import claim, sealed, storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index.described import DescribedPhotos
from pairvpr.index.generations import IndexManifest, read_generation, read_images, read_manifest
from pairvpr.index.reader import removed_ids
from pairvpr.index.reduction import Reduction, read_reduction
from pairvpr.where import Map


@dataclass(frozen=True)
class GenerationKey:
    """Which generation of which index, in any process."""

    directory: str
    number: int
    sha256: str
    """Of its manifest: an index that is built anew has the same numbers."""


@dataclass(frozen=True)
class Generation:
    """All of an open generation but its shards. It never changes."""

    directory: str
    manifest: IndexManifest
    photos: Manifest
    described: DescribedPhotos
    map: Map
    reduction: Reduction | None

    @classmethod
    def open(cls, directory: str, manifest: IndexManifest, utm_epsg: int | None) -> Generation:
        """Read its tables. Raises `UserError` for damaged ones."""
        photos = read_images(directory, manifest)
        described = DescribedPhotos(directory, manifest, photos)
        reduction = read_reduction(directory, manifest)
        return cls(directory, manifest, photos, described, Map(photos, utm_epsg), reduction)

    @cached_property
    def has_positions(self) -> bool:
        """Whether any photo's position is known."""
        return not bool(np.isnan(self.photos.utm_m).all())

    @cached_property
    def removed(self) -> frozenset[int]:
        """Ids of the photos that can't be found any more."""
        return frozenset(removed_ids(self.directory, self.manifest).tolist())

    @property
    def number(self) -> int:
        """1, 2, 3, ..."""
        return self.manifest.generation

    @cached_property
    def key(self) -> GenerationKey:
        """Its name among all generations."""
        content = json.dumps(asdict(self.manifest), sort_keys=True)
        return GenerationKey(self.directory, self.number, hashlib.sha256(content.encode()).hexdigest())

    @cached_property
    def index_digest(self) -> str:
        """12 hexadecimal digits: the same for all generations of an index, others for one that is built anew."""
        return hashlib.sha256(json.dumps(_origin(self.manifest), sort_keys=True).encode()).hexdigest()[:12]


def _origin(manifest: IndexManifest) -> list[Any]:
    """What every generation of an index keeps: its network, and the photos that it was built from."""
    return [manifest.model, manifest.images_root, asdict(manifest.images[0])]


def check_same_index(directory: str, before: IndexManifest, after: IndexManifest) -> None:
    """Raise `UserError` unless both are generations of one index, in which an id is always the same photo."""
    tables = [[table.file.sha256 for table in each.images] for each in (before, after)]
    num_shared = min(map(len, tables))
    is_same = _origin(before) == _origin(after) and tables[0][:num_shared] == tables[1][:num_shared]
    if not is_same or (before.generation == after.generation and before != after):
        raise UserError(
            f"index {directory} was built anew: its generation {after.generation} is none of the open index; expected "
            "the same index, or a new start"
        )


def manifest_of(directory: str, generation: int | None) -> IndexManifest:
    """A generation's manifest (None = the newest).

    Raises `UserError` if there is none, or if the photos of the index are gone.
    """
    newest = read_manifest(directory)
    if newest is None:
        raise UserError(f"index {directory}: no finished index there; expected a directory with manifest.json")
    is_number = isinstance(generation, int)
    manifest = read_generation(directory, generation) if is_number else newest if generation is None else None
    if manifest is None:
        raise UserError(
            f"generation={generation}: index {directory} has no such generation; expected 1 to {newest.generation}"
        )
    if not storage.exists(manifest.images_root):
        raise UserError(
            f"index {directory}: its photos were in {manifest.images_root}, which does not exist; expected them where "
            "they were when it was built, because re-ranking reads them again"
        )
    return manifest


def network_of(directory: str, manifest: IndexManifest, model: str | ModelConfig | None) -> ModelConfig:
    """The network given by `model`, or described by the index's settings, with the weights published for its name.

    Raises `UserError` for an index whose descriptors are of a file: nothing here makes such rows of a query.
    """
    if not manifest.model["weights_sha256"]:
        raise UserError(
            f"index {directory} has descriptors of a file, and a Localizer describes photos by a network; expected "
            "pairvpr query with describe.descriptors=FILE"
        )
    if isinstance(model, ModelConfig):
        return model
    if model is not None:
        return named_network(model)
    name = manifest.model["name"]
    known = named_network(name) if name in network_names() else None
    settings = sealed.read_json(storage.join(directory, claim.FILE), "expected model=...")
    if settings is not None and "descriptor" in settings:
        raise UserError(
            f"index {directory} was made with descriptor.module={name}; expected model=..., which scores pairs (one of "
            f"{', '.join(network_names())}, or a ModelConfig), and descriptor=DescriptorConfig(module={name!r}, ...)"
        )
    if settings is None:
        if known is not None:
            return known
        raise UserError(
            f"index {directory}: its {claim.FILE}, which describes the network {name}, is missing; expected model=... "
            f"(one of {', '.join(network_names())}, or a ModelConfig)"
        )
    try:
        return replace(network_of_settings(settings["model"]), weights=None if known is None else known.weights)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"index {directory}: its {claim.FILE} is not readable: {storage.reason(error)}") from error
