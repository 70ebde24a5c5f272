"""From the settings of the service to what it opens: the network, the indices, the rules of its answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pairvpr.config.schema import ModelConfig
from pairvpr.config.serve_schema import ServeConfig
from pairvpr.data import storage
from pairvpr.engines import LocalNetwork, Network
from pairvpr.errors import UserError
from pairvpr.evaluation.confidence import Rules, calibrated, check_positions_of_votes, unlike_the_network
from pairvpr.localizer import Localizer, OpenShards
from pairvpr.models.weights import build_model, find_weights, load_weights
from pairvpr.opened import Generation, manifest_of
from pairvpr.retrieval.first_stage import FirstStage
from pairvpr.retrieval.user_network import first_stage_of

MOST_TOKEN_BYTES = 4096


@dataclass(frozen=True)
class ServedIndex:
    """An index of the service. It can be sent to other processes."""

    name: str
    directory: str
    utm_epsg: int | None

    def open(self, generation: int | None = None) -> Generation:
        """A generation of it (None = the newest), without shards. Raises `UserError` as `manifest_of`."""
        return Generation.open(self.directory, manifest_of(self.directory, generation), self.utm_epsg)


@dataclass(frozen=True)
class Opening:
    """All that a process needs to open its part of the service. It can be sent to other processes."""

    config: ServeConfig
    indices: dict[str, ServedIndex]
    weights_sha256: str
    """Of the weights that score pairs."""
    first_stage: FirstStage
    """What describes photos."""

    @classmethod
    def of(cls, config: ServeConfig) -> Opening:
        """Read and check everything but weights and shards.

        Raises `UserError` for an index that is missing, was made by another network, or does not fit the calibration,
        or if `descriptor.module` names no usable network.
        """
        indices = {
            name: ServedIndex(name, storage.absolute(path), config.serve.utm_epsg)
            for name, path in config.by_name.items()
        }
        config = replace(config, model=_absolute(config.model))
        read_token(config)
        opened = [index.open() for index in indices.values()]
        weights_sha256 = find_weights(config.model).sha256
        first_stage = first_stage_of(config.model, weights_sha256, config.describe, config.descriptor)
        opening = cls(config, indices, weights_sha256, first_stage)
        for generation in opened:
            opening._check(generation)
        return opening

    def _check(self, opened: Generation) -> None:
        self.first_stage.check_made(opened.directory, opened.manifest)
        judged_by = calibrated(self.config.rerank)
        if judged_by is not None:
            settings = self.config.model.settings() | {"weights_sha256": self.weights_sha256}
            first_stage = unlike_the_network(self.first_stage.settings, opened.manifest.reduced_to)
            judged_by.check(str(self.config.rerank.calibration), settings, first_stage)
        check_positions_of_votes(self.rules.decision, opened.photos.utm_m)

    @property
    def rules(self) -> Rules:
        """How pair scores become answers."""
        return Rules.of(self.config.rerank, calibrated(self.config.rerank))

    def network(self, device: torch.device) -> LocalNetwork:
        """The network in this process. Raises `UserError` if the weights have changed meanwhile."""
        config, rules = self.config, self.rules
        found = find_weights(config.model)
        if found.sha256 != self.weights_sha256:
            raise UserError(
                f"model.weights={config.model.weights}: they have changed since the service started; expected sha256 "
                f"{self.weights_sha256}, or a new start"
            )
        model = build_model(config.model, load_weights(config.model, found), device)
        return LocalNetwork(
            model,
            found.sha256,
            config.describe,
            config.rerank,
            rules.weights,
            rules.stop_margin,
            self.first_stage.user_network,
        )

    def localizers(self, network: Network, open_shards: Callable[[ServedIndex], OpenShards]) -> dict[str, Localizer]:
        """Every index with this network, and with shards that are opened here or elsewhere."""
        config, rules = self.config, self.rules
        return {
            name: Localizer(
                index.open(), network, open_shards(index), config.index, config.rerank, rules, index.utm_epsg
            )
            for name, index in self.indices.items()
        }


def _absolute(model: ModelConfig) -> ModelConfig:
    return model if model.weights is None else replace(model, weights=storage.absolute(model.weights))


def read_token(config: ServeConfig) -> str | None:
    """The token of `serve.token_file`. Raises `UserError` if the file holds none."""
    url = config.serve.token_file
    if url is None:
        return None
    try:
        token = storage.read_head(url, MOST_TOKEN_BYTES).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serve.token_file={url}: {storage.reason(error)}; expected a file with a token") from error
    if len(token) < 16 or not token.isprintable() or " " in token:
        raise UserError(
            f"serve.token_file={url}: expected one line of 16 or more printable characters, "
            "as from `openssl rand -hex 32`"
        )
    return token
