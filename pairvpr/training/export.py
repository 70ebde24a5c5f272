"""Export a stage-two checkpoint as weights with the published names."""

from __future__ import annotations

import torch

from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.models.weights import safetensors_bytes
from pairvpr.training import checkpoint


def export_weights(url: str, output: str, *, half: bool) -> None:
    """Write the bare state dict of a stage-two checkpoint (path or URL) to `output` (.pth or .safetensors).

    `half`: as 16-bit floats. Raises `UserError` if it is not a stage-two checkpoint.
    """
    try:
        found = checkpoint.load(url, stage=2, key="checkpoint")
    except OSError as error:
        raise UserError(f"checkpoint={url}: can't be read: {storage.reason(error)}") from error
    state = {name: tensor.half() if half else tensor.float() for name, tensor in found.model.items()}
    if output.endswith(".safetensors"):
        storage.write_bytes(output, safetensors_bytes(state))
        return
    with storage.written_locally(output) as path:
        torch.save(state, path)
