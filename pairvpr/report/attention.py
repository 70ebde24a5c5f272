"""Why: where the pair decoder's class token looks in both photos of a pair. The only part of a report that needs torch.

L patches, C encoder width, D decoder width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.config.networks import named_network, network_names, network_of_settings
from pairvpr.config.schema import ModelConfig
from pairvpr.data import images
from pairvpr.errors import UserError
from pairvpr.models.pair_decoder import DecoderBlock
from pairvpr.models.pair_vpr import PairVPR, normalise
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
        first, second = self._model.embed(dense).float().split(1)
        in_query, in_answer = class_attention(self._model, first, second)
        in_answer_too, in_query_too = class_attention(self._model, second, first)
        return self._grid(in_query + in_query_too), self._grid(in_answer + in_answer_too)

    def _load(self, url: str) -> NDArray[np.uint8]:
        network = self._network
        return images.load(
            url,
            network.image_size_px,
            scaled_decoding=network.scaled_decoding,
            max_megapixels=network.max_megapixels,
        )

    def _grid(self, twice: Tensor) -> NDArray[np.float32]:
        side = self._network.image_size_px // self._network.patch_size_px
        return (twice / 2).reshape(side, side).numpy()


def class_attention(model: PairVPR, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """`embed`'s output of a pair, (1, L, D) each -> the class token's attention over the patches of both, (L,) each.

    Softmax weights of the class token's row, mean over blocks and heads: of self-attention over the first photo (the
    token's weight on itself left out, the rest scaled to 1), of cross-attention over the second.
    """
    x, memory = model.first_sequence(first), model.second_sequence(second)
    over_first, over_second = [], []
    for block in cast("list[DecoderBlock]", list(model.dec_blocks)):
        query, key, _ = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
        over_first.append(_weights(query[:, :1], key)[1:])
        x = block.attend_itself(x)
        keys_values = block.keys_values(memory)
        query = block.cross_attn.projq(block.norm2(x[:, :1])).unflatten(-1, (block.cross_attn.num_heads, -1))
        over_second.append(_weights(query, keys_values[0]))
        x = block.attend_memory(x, keys_values)
    own = torch.stack(over_first).mean(0)
    return own / own.sum(), torch.stack(over_second).mean(0)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """One query token (1, 1, H, E) and keys (1, M, H, E) -> the softmax weights (M,), mean over heads."""
    products = torch.einsum("qhe,mhe->hm", query[0].float(), key[0].float()) / query.shape[-1] ** 0.5
    return products.softmax(-1).mean(0)


def _network(run: FinishedRun, weights: str | None) -> ModelConfig:
    try:
        network = network_of_settings(cast("dict[str, Any]", run.settings["model"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run.url}: its settings.json says no network; expected a whole run") from error
    if weights is None and network.name in network_names() and not run.metrics["model"].get("untrained"):
        weights = named_network(network.name).weights
    return replace(network, weights=weights)
