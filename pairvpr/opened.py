"""An open generation of an index: its photos, where they were taken, and the network that described them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

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
