"""The network inside an actor: what it is built from there, and its device."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import torch

from pairvpr.config.schema import ModelConfig
from pairvpr.distributed.runtime import has_gpu
from pairvpr.models.weights import Weights, build_model
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.first_stage import UserNetwork
from pairvpr.retrieval.user_network import UserDescriber


def own_device() -> torch.device:
    """The GPU that Ray gave this actor, or the CPU."""
    return torch.device("cuda" if has_gpu() else "cpu")


@dataclass(frozen=True)
class ModelSource:
    """All that an actor needs to build the network: its shape, and its weights, once in the object store."""

    config: ModelConfig
    weights: ray.ObjectRef[Weights]

    @property
    def photos(self) -> ModelConfig:
        """How it takes photos."""
        return self.config

    @property
    def width(self) -> int:
        """Descriptor width."""
        return self.config.descriptor_dim

    def describer(self, num_threads: int) -> Describer:
        """The network on this actor's GPU if it has one, else on its CPU threads."""
        return Describer(build_model(self.config, ray.get(self.weights), own_device()), num_threads)


@dataclass(frozen=True)
class UserNetworkSource:
    """A network of the user's environment, which every actor builds for itself: `photos` is all that is known of it."""

    photos: UserNetwork

    @property
    def width(self) -> int:
        """Descriptor width."""
        return self.photos.width

    def describer(self, num_threads: int) -> UserDescriber:
        """The network on this actor's GPU if it has one, else on its CPU threads."""
        return UserDescriber.built(self.photos, own_device(), num_threads)


NetworkSource = ModelSource | UserNetworkSource
