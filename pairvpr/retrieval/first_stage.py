"""First stages: what makes the global descriptors that an index is of. G descriptor width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pairvpr.config.schema import DescribeConfig, ModelConfig
from pairvpr.data.descriptor_file import DescriptorFile


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """What is known of a first stage before it describes a photo: which one it is, and how wide its rows are.

    An index keeps `name` and `weights_sha256` in its manifest and `settings`, sections in plain values, in its
    settings.json, and is refused by another first stage.
    """

    name: str
    weights_sha256: str
    settings: Mapping[str, Any]
    width: int
    file: DescriptorFile | None = None
    """Where the rows of database photos are, if they are in a file."""

    @classmethod
    def own(cls, model: ModelConfig, weights_sha256: str, config: DescribeConfig) -> FirstStage:
        """Pair-VPR's own network."""
        return cls(
            name=model.name,
            weights_sha256=weights_sha256,
            settings={
                "model": model.settings() | {"weights_sha256": weights_sha256},
                "describe": {"batch_size": config.batch_size, "num_threads_per_actor": config.num_threads_per_actor},
            },
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
