"""Weights: known by their checksum, then loaded; every key checked, what is new initialised.

`.pth` files hold a bare state dict or a dict with `model`; `.safetensors` hold tensors alone (`weights_file.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pairvpr.config.schema import ModelConfig, Precision
from pairvpr.errors import UserError
from pairvpr.models.linear import to_sixteen_bits
from pairvpr.models.pair_vpr import AUTOCAST_DTYPES, PairVPR
from pairvpr.models.pos_embed import resize_decoder_table, sine_cosine_2d
from pairvpr.models.vit import LayerScale
from pairvpr.models.weights_file import WeightsFile, find_weights_file, read_state_dict
from pairvpr.terminal import say

UNTRAINED_SEED = 0
CLASS_TOKEN_STD = 1e-6
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NUM_NAMED = 5  # names in a message
TERMS = "the published Pair-VPR weights carry their owners' own, non-commercial terms"


@dataclass(frozen=True)
class Weights:
    """A checked state dict of float32 arrays and the sha256 of the file that holds (or would hold) it."""

    arrays: Mapping[str, NDArray[np.float32]]
    sha256: str
    untrained: bool


@dataclass(frozen=True)
class WeightsSource:
    """The weights that a configuration names, not loaded yet."""

    sha256: str
    """Of the file that holds (or would hold) them."""
    file: WeightsFile | None
    """None = untrained ones, drawn from a seed."""

    @property
    def untrained(self) -> bool:
        return self.file is None


def find_weights(config: ModelConfig) -> WeightsSource:
    """Which weights `config` names; remote ones are fetched. Raises `UserError` for a file that is not there."""
    if config.weights is None:
        return WeightsSource(hashlib.sha256(safetensors_bytes(untrained_state(config))).hexdigest(), None)
    file = find_weights_file(config.weights)
    return WeightsSource(file.sha256, file)


def load_weights(config: ModelConfig, source: WeightsSource | None = None) -> Weights:
    """The weights of `source`, or those that `config` names, checked against the network.

    Nothing of the file is executed. Raises `UserError` for a missing or foreign file, code in it, a file that changed
    since it was found, and missing, unexpected or mis-shaped keys, all named.
    """
    source = source or find_weights(config)
    if source.file is None:
        state = untrained_state(config)
    else:
        state = read_state_dict(source.file)
        with torch.device("meta"):
            expected = PairVPR(config).state_dict()
        check_keys(state, expected, source.file.url)
    return Weights(float_arrays(state, config.weights), source.sha256, source.untrained)


def announce(config: ModelConfig, weights: Weights | WeightsSource) -> None:
    """Say on standard error which weights run, and under whose terms."""
    if weights.untrained:
        text = f"model {config.name}: UNTRAINED, random weights from a fixed seed (model.weights=null)"
    else:
        text = f"model {config.name}: weights {config.weights} (sha256 {weights.sha256[:12]}); note: {TERMS}"
    say(text)


def build_model(config: ModelConfig, weights: Weights, device: torch.device) -> PairVPR:
    """The network with these weights on a device, for inference; large layers in its precision."""
    with torch.device("meta"):
        model = PairVPR(config)
    model = model.to_empty(device=device)
    # The arrays may be read-only views of shared memory; they are copied here, never written.
    state = {name: torch.from_numpy(np.array(array)) for name, array in weights.arrays.items()}
    model.load_state_dict(state, strict=True)
    model.encoder.model.resize_positions(config.image_size_px // config.patch_size_px)
    if config.precision is not Precision.fp32:
        to_sixteen_bits(model, AUTOCAST_DTYPES[config.precision], packed=not config.compile)
    return model.eval().requires_grad_(False)


def check_keys(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], url: str, key: str = "model.weights"
) -> None:
    """Raise `UserError` that counts every kind of misfit between a file's tensors and the network's, and names some."""
    if misfits := _misfits(state, expected):
        raise UserError(f"{key}={url} does not fit the network; {misfits}")


def _misfits(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    common = sorted(expected.keys() & state.keys())
    misfits = {
        "missing": sorted(expected.keys() - state.keys()),
        "unexpected": sorted(state.keys() - expected.keys()),
        "mis-shaped": [
            f"{name} {_shape(state[name])} instead of {_shape(expected[name])}"
            for name in common
            if state[name].shape != expected[name].shape
        ],
        "not in floats of 16 to 64 bits": [
            f"{name} {state[name].dtype}" for name in common if state[name].dtype not in FLOATS
        ],
    }
    return "; ".join(f"{len(names)} {kind}: {_first(names)}" for kind, names in misfits.items() if names)


def _first(names: Sequence[str]) -> str:
    """The first names of many."""
    return ", ".join([*names[:NUM_NAMED], *(["..."] if len(names) > NUM_NAMED else [])])


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def float_arrays(
    state: Mapping[str, Tensor], url: str | None, key: str = "model.weights"
) -> dict[str, NDArray[np.float32]]:
    """The tensors as float32 arrays. Raises `UserError`, naming the setting `key`, for NaN and infinite numbers."""
    arrays = {name: tensor.detach().to(torch.float32).numpy() for name, tensor in state.items()}
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise UserError(
            f"{key}={url}: NaN or infinite values in {len(broken)} of {len(arrays)} tensors: {_first(broken)}; "
            "expected finite float32 values"
        )
    return arrays


def stage_two_start(stage_one_state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state dict that stage two starts from, for the network `config` at stage two's image side.

    Everything is stage one's, at whatever image side that ran; the decoder's position table (L, D) is resized to the
    new grid, and the class token, the one new parameter, is initialised from a fixed seed. Method, section 2.
    Raises `UserError` for a state dict of another network, or of another stage.
    """
    table = stage_one_state.get("dec_pos_embed", torch.empty(0))
    stored_side_px = int(len(table) ** 0.5) * config.patch_size_px or config.image_size_px
    with torch.device("meta"):
        expected = PairVPR(replace(config, image_size_px=stored_side_px), pair_classifier_token=False).state_dict()
    if misfits := _misfits(stage_one_state, expected):
        raise UserError(f"stage two can't start from these stage-one weights: {misfits}")
    table = resize_decoder_table(table, config.image_size_px // config.patch_size_px)
    generator = torch.Generator().manual_seed(UNTRAINED_SEED)
    return dict(stage_one_state) | {
        "decoder_clstoken": CLASS_TOKEN_STD * torch.randn(1, 1, config.decoder.embed_dim, generator=generator),
        "dec_pos_embed": table,
        "dec_pos_embed_cls": torch.cat([torch.zeros_like(table[:1]), table]),
    }


def untrained_state(
    config: ModelConfig, *, seed: int = UNTRAINED_SEED, pair_classifier_token: bool = True
) -> dict[str, Tensor]:
    """A state dict drawn from a seed, the same on every machine; without the class token it is stage one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PairVPR(config, pair_classifier_token=pair_classifier_token)
        initialise(model)
    return model.state_dict()


@torch.no_grad()
def initialise(model: PairVPR) -> None:
    """Method, section 2: linear weights Xavier-uniform, biases 0, norms 1 and 0, the tokens normal."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            nn.init.zeros_(module.bias if module.bias is not None else torch.empty(0))
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, LayerScale):
            nn.init.ones_(module.gamma)
    nn.init.normal_(model.mask_token, std=0.02)
    if hasattr(model, "decoder_clstoken"):
        nn.init.normal_(model.decoder_clstoken, std=CLASS_TOKEN_STD)
    encoder = model.encoder.model
    nn.init.normal_(encoder.cls_token, std=1e-6)
    # As large as patch tokens are: from nothing, a network would take long to notice positions of std 0.02.
    dim, grid_size = encoder.config.embed_dim, round((encoder.pos_embed.shape[1] - 1) ** 0.5)
    nn.init.zeros_(encoder.pos_embed)
    encoder.pos_embed[0, 1:] = sine_cosine_2d((dim + 3) // 4 * 4, grid_size)[:, :dim]
    if encoder.config.num_registers:
        nn.init.normal_(encoder.register_tokens, std=1e-6)


def safetensors_bytes(state: Mapping[str, Tensor]) -> bytes:
    """The safetensors file of a state dict."""
    import safetensors.torch

    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
