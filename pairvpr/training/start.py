"""Initial weights of a stage: from the previous stage, from DINOv2, or seeded random ones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from pairvpr.config.schema import ModelConfig
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import Weights, check_keys, float_arrays, stage_two_start, untrained_state
from pairvpr.models.weights_file import find_weights_file, read_state_dict

KEY = "train.start"
ENCODER = "encoder.model."
ONLY_IN_STAGE_TWO = "decoder_clstoken"


def stage_one_start_weights(model: ModelConfig, start: str | None, seed: int) -> Weights:
    """`start`: DINOv2 weights for the encoder, or a complete stage-one state dict; None = random ones from `seed`.

    Raises `UserError` for a file that is neither, or of another network.
    """
    state = untrained_state(model, seed=seed, pair_classifier_token=False)
    if start is None:
        return _weights(state, f"seed {seed}", None)
    file = find_weights_file(start, KEY)
    given, digest = read_state_dict(file, KEY), file.sha256
    if any(name.startswith(ENCODER) for name in given):
        check_keys(given, state, start, KEY)
    else:
        encoder = {name.removeprefix(ENCODER): tensor for name, tensor in state.items() if name.startswith(ENCODER)}
        check_keys(given, encoder, start, KEY)
        given = {f"{ENCODER}{name}": tensor for name, tensor in given.items()}
    return _weights(state | given, f"{digest} and seed {seed}", start)


def stage_two_start_weights(model: ModelConfig, start: str | None, seed: int) -> Weights:
    """`start`: a stage-one checkpoint or a complete stage-two state dict; None = random ones from `seed`.

    Raises `UserError` for a file that is neither, or of another network.
    """
    if start is None:
        return _weights(untrained_state(model, seed=seed), f"seed {seed}", None)
    file = find_weights_file(start, KEY)
    given, digest = read_state_dict(file, KEY), file.sha256
    if ONLY_IN_STAGE_TWO in given:
        with torch.device("meta"):
            expected = PairVPR(model).state_dict()
        check_keys(given, expected, start, KEY)
        return _weights(given, digest, start)
    return _weights(stage_two_start(given, model), digest, start)


def _weights(state: Mapping[str, Tensor], origin: str, start: str | None) -> Weights:
    digest = hashlib.sha256(origin.encode()).hexdigest()
    return Weights(float_arrays(state, start, KEY), digest, untrained=start is None)
