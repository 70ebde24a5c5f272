"""The numbers and photos that lie beside a developer's checkout; tests that need them skip where they are absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pairvpr.config.schema import DecoderConfig, EncoderConfig, Ffn, ModelConfig

SHARED = Path(os.environ.get("PAIRVPR_SHARED", Path(__file__).resolve().parents[3] / "shared"))

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no {SHARED}: the numbers and photos to compare with are not on this machine"
)


def parity_arrays(name: str) -> dict[str, NDArray[Any]]:
    """All arrays of `parity/<name>.npz`."""
    with np.load(SHARED / "parity" / f"{name}.npz") as arrays:
        return dict(arrays)


def weights_of(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, torch.Tensor]:
    """The state dict below `prefix`."""
    return {
        name.removeprefix(prefix): torch.from_numpy(array) for name, array in arrays.items() if name.startswith(prefix)
    }


def parity_model_config(name: str, *, stage: str) -> ModelConfig:
    """The small network that `parity/<name>.json` describes, at the image side of `stage` (one, two)."""
    shape = json.loads((SHARED / "parity" / f"{name}.json").read_text())
    return ModelConfig(
        name=name,
        image_size_px=shape[f"stage_{stage}_px"],
        descriptor_dim=shape["global_dim"],
        encoder=EncoderConfig(
            embed_dim=shape["dim"],
            depth=shape["depth"],
            num_heads=shape["heads"],
            ffn=Ffn.mlp if shape["ffn"] == "mlp" else Ffn.swiglu,
            num_registers=shape["regs"],
            pretrain_image_size_px=shape["pretrain_px"],
            pos_embed_antialias=shape["antialias"],
            pos_embed_offset=shape["offset"],
            num_trainable_blocks=1,
        ),
        decoder=DecoderConfig(embed_dim=shape["dec_dim"], depth=shape["dec_depth"], num_heads=shape["dec_heads"]),
    )
