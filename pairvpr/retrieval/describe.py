"""The network in inference: pixels -> global descriptors and dense features.

B photos in a batch, S image side in pixels, G descriptor width, L patches, D decoder width.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.config.schema import ModelConfig
from pairvpr.errors import UserError
from pairvpr.models.compiled import compiled, filled, power_of_two
from pairvpr.models.pair_vpr import PairVPR, normalise, sent


class Describer:
    """The network on its device, with `num_threads` CPU threads (None = as the process has)."""

    def __init__(self, model: PairVPR, num_threads: int | None = None) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self._num_threads = num_threads
        self._describe = compiled(lambda pixels: model.describe(normalise(pixels)), model.config)
        self._embed = compiled(model.embed, model.config)

    @property
    def photos(self) -> ModelConfig:
        """How it takes photos."""
        return self.model.config

    @property
    def width(self) -> int:
        """G."""
        return self.model.config.descriptor_dim

    @torch.inference_mode()
    def descriptors(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(B, S, S, 3) uint8 -> (B, G) float32, unit length. Raises `UserError` if they are not finite."""
        return self._described(pixels)[0]

    @torch.inference_mode()
    def both(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Tensor]:
        """One photo (S, S, 3) uint8 -> its `descriptors` (1, G) and what it is `embedded` as (L, D), in one pass."""
        descriptors, dense = self._described(pixels[None])
        return descriptors, self._embed(dense)[0]

    def _described(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Tensor]:
        """(B, S, S, 3) uint8 -> descriptors (B, G), dense features (B, L, C) on the device."""
        self._set_threads()
        on_device = sent(torch.from_numpy(pixels), self.device)
        if self.model.config.compile:
            on_device = filled(on_device, power_of_two(len(pixels)))
        rows, dense = self._describe(on_device)
        descriptors = rows[: len(pixels)].cpu().numpy()
        if not np.isfinite(descriptors).all():
            raise UserError(
                f"the descriptors of model {self.model.config.name} are not finite at "
                f"model.precision={self.model.config.precision}; expected sound weights (fp32 and bf16 can't overflow)"
            )
        return descriptors, dense

    @torch.inference_mode()
    def embedded(self, pixels: NDArray[np.uint8]) -> Tensor:
        """One photo (S, S, 3) uint8 -> the pair decoder's input (L, D) on the device, 16-bit under autocast.

        One photo per forward pass, so that its features never depend on other photos in a batch.
        """
        self._set_threads()
        _, dense = self._describe(sent(torch.from_numpy(pixels), self.device).unsqueeze(0))
        return self._embed(dense)[0]

    def _set_threads(self) -> None:
        """Set per calling thread: OpenMP and MKL keep one number per thread, and several threads call an actor."""
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
