"""First stages: what makes the global descriptors that an index is of. G descriptor width, S image side in pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pairvpr.config.schema import MAX_MEGAPIXELS, DescribePassConfig, ModelConfig
from pairvpr.data.descriptor_file import DescriptorFile
from pairvpr.errors import UserError
from pairvpr.index.generations import IndexManifest, check_model


@dataclass(frozen=True, kw_only=True)
class UserNetwork:
    """What is known of a network of the user's environment; whoever needs it builds it from `module`.

    Its photos are squares of `image_size_px`, less `mean`, divided by `std`.
    """

    module: str
    """package.module:function"""
    image_size_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scaled_decoding: bool
    max_megapixels: float
    width: int
    weights_sha256: str
    """Of its state dict (`user_network.fingerprint`)."""

    def settings(self) -> dict[str, Any]:
        """What of it decides the bytes of an index, in plain values; of decoding, what differs from the defaults."""
        return {
            "module": self.module,
            "image_size_px": self.image_size_px,
            "mean": list(self.mean),
            "std": list(self.std),
            "width": self.width,
            "weights_sha256": self.weights_sha256,
            **({"scaled_decoding": True} if self.scaled_decoding else {}),
            **({"max_megapixels": self.max_megapixels} if self.max_megapixels != MAX_MEGAPIXELS else {}),
        }


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """What is known of a first stage before it describes a photo: which one it is, and how wide its rows are.

    Rows come from Pair-VPR's own network, from a file, or from a network of the user's. An index keeps `name` and
    `weights_sha256` in its manifest and `settings`, sections in plain values, in its settings.json, and is refused by
    another first stage.
    """

    name: str
    weights_sha256: str
    settings: Mapping[str, Any]
    width: int
    file: DescriptorFile | None = None
    """Where the rows of database photos are, if they are in a file."""
    user_network: UserNetwork | None = None
    """What makes the rows, if the user's own network does."""

    @classmethod
    def own(cls, model: ModelConfig, weights_sha256: str, config: DescribePassConfig) -> FirstStage:
        """Pair-VPR's own network."""
        section = {"model": model.settings() | {"weights_sha256": weights_sha256}}
        return cls(
            name=model.name,
            weights_sha256=weights_sha256,
            settings=section | _pass_settings(config),
            width=model.descriptor_dim,
        )

    @classmethod
    def of_file(cls, file: DescriptorFile) -> FirstStage:
        """Somebody's file. Which network made it is not known, so any file of this width may be added or asked."""
        return cls(
            name="descriptors",
            weights_sha256="",
            settings={"descriptors": file.settings()},
            width=file.width,
            file=file,
        )

    @classmethod
    def of_user_network(cls, network: UserNetwork, config: DescribePassConfig) -> FirstStage:
        """A network of the user's environment."""
        return cls(
            name=network.module,
            weights_sha256=network.weights_sha256,
            settings={"descriptor": network.settings()} | _pass_settings(config),
            width=network.width,
            user_network=network,
        )

    @property
    def entry(self) -> dict[str, Any] | None:
        """What metrics.json says of it; None of Pair-VPR's own, which is there as the model."""
        if self.file is None and self.user_network is None:
            return None
        weights = {} if self.user_network is None else {"weights_sha256": self.weights_sha256}
        return {"name": self.name, "descriptor_dim": self.width, **weights}

    def check_made(self, index: str, manifest: IndexManifest) -> None:
        """Raise `UserError` unless this first stage made a finished index, as far as that can be known."""
        check_model(index, manifest, name=self.name, weights_sha256=self.weights_sha256, settings=self.settings)
        if manifest.described_dim != self.width:
            raise UserError(
                f"index {index} has descriptors of {manifest.described_dim} values, {self.name} of {self.width}; "
                "expected those of the network that described its photos"
            )


def _pass_settings(config: DescribePassConfig) -> dict[str, Any]:
    """How photos share a forward pass, which decides the rounding."""
    return {"describe": {"batch_size": config.batch_size, "num_threads_per_actor": config.num_threads_per_actor}}
