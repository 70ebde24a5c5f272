"""Why: where the network of a run looks in both photos of a pair. The only part of a report that needs torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from pairvpr.config.networks import named_network, network_names, network_of_settings
from pairvpr.config.schema import ModelConfig
from pairvpr.data import images
from pairvpr.errors import UserError
from pairvpr.models.class_attention import attention_grids
from pairvpr.models.pair_vpr import normalise
from pairvpr.models.weights import build_model, find_weights, load_weights
from pairvpr.report.finished import FinishedRun


class Explainer:
    """The network of a run, on this machine's CPU."""

    def __init__(self, run: FinishedRun, weights: str | None) -> None:
        """`weights` (path or URL) are by default those published for the network.

        Raises `UserError` where they are not those that the run had.
        """
        self._network = _network(run, weights)
        found = find_weights(self._network)
        expected = run.metrics["model"]["weights_sha256"]
        if found.sha256 != expected:
            raise UserError(
                f"report.weights={self._network.weights}: their sha256 is {found.sha256[:12]}, the run's weights have "
                f"{str(expected)[:12]}; expected the weights of the run"
            )
        self._model = build_model(self._network, load_weights(self._network, found), torch.device("cpu"))

    @torch.inference_mode()
    def maps(self, query: str, answer: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Two photos (path or URL) -> where the class token looks in each: two square grids of patches, each sums to 1.

        The mean over both directions in which the pair is scored. Raises `BrokenImageError` and `StorageError`.
        """
        pixels = np.stack([self._load(url) for url in (query, answer)])
        _, dense = self._model.describe(normalise(torch.from_numpy(pixels)))
        first, second = self._model.embed(dense).split(1)
        return attention_grids(self._model, first, second)

    def _load(self, url: str) -> NDArray[np.uint8]:
        network = self._network
        return images.load(
            url,
            network.image_size_px,
            scaled_decoding=network.scaled_decoding,
            max_megapixels=network.max_megapixels,
        )


def _network(run: FinishedRun, weights: str | None) -> ModelConfig:
    try:
        network = network_of_settings(cast("dict[str, Any]", run.settings["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.url}: its settings.json says no network; expected a whole run") from error
    if weights is None and network.name in network_names() and not run.metrics["model"].get("untrained"):
        weights = named_network(network.name).weights
    return replace(network, weights=weights)
