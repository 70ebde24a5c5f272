"""The trainable parameters of each stage and their rates: AdamW, with schedules that depend only on the step.

A resumed run computes its rates from its step; there is no scheduler with a state. Method,
sections 2, 4 and 5.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import AdamW, Optimizer

from pairvpr.models.pair_vpr import PairVPR

BETAS = (0.9, 0.999)
REFERENCE_BATCH_SIZE = 1024


class Multipliers(NamedTuple):
    """A parameter's multipliers of learning rate and weight decay."""

    lr: float
    weight_decay: float


def freeze_for_stage_one(model: PairVPR, *, train_everything: bool = False) -> None:
    """Freeze all but stage one's parameters: the last encoder blocks, decoder, reconstruction head.

    `train_everything` adds the encoder's embedding, tokens and earlier blocks, for training from scratch.
    """
    model.requires_grad_(True)
    if not train_everything:
        model.encoder.model.freeze_all_but_last_blocks()
    model.mask_token.requires_grad_(False)
    model.globalizer.requires_grad_(False)
    model.classvprmodule.requires_grad_(False)


def freeze_for_stage_two(model: PairVPR, *, train_everything: bool = False) -> None:
    """Freeze all but stage two's parameters: the last encoder blocks, descriptor layer, decoder, pair classifier.

    `train_everything` adds the encoder's embedding, tokens and earlier blocks, except the mask token of stage one.
    """
    model.requires_grad_(True)
    if not train_everything:
        model.encoder.model.freeze_all_but_last_blocks()
    model.encoder.model.mask_token.requires_grad_(False)
    model.mask_token.requires_grad_(False)
    model.prediction_head.requires_grad_(False)


def stage_one_multipliers(
    model: PairVPR, *, layerwise_decay: float, patch_embed_lr_mult: float
) -> dict[str, Multipliers]:
    """Multipliers of every parameter, including frozen ones, by name.

    The learning rate decays by a factor per layer, from the reconstruction head down through decoder and encoder.
    """
    encoder_depth, decoder_depth = model.config.encoder.depth, model.config.decoder.depth
    multipliers = {}
    for name, parameter in model.named_parameters():
        layer = _layer(name, encoder_depth, decoder_depth)
        lr = layerwise_decay ** (encoder_depth + decoder_depth + 1 - layer)
        if name.startswith("encoder.model.patch_embed."):
            lr *= patch_embed_lr_mult
        # Biases, norms and LayerScale gammas are the vectors of this network.
        multipliers[name] = Multipliers(lr, weight_decay=1.0 if parameter.ndim > 1 else 0.0)
    return multipliers


def _layer(name: str, encoder_depth: int, decoder_depth: int) -> int:
    """A parameter's layer: 0 for inputs of the first block, and for parameters that stage one does not train."""
    owner, *rest = name.removeprefix("encoder.model.").split(".")
    match owner:
        case "blocks":
            return int(rest[0]) + 1
        case "norm" | "decoder_embed":
            return encoder_depth
        case "dec_blocks":
            return encoder_depth + int(rest[0]) + 1
        case "dec_norm":
            return encoder_depth + decoder_depth
        case "prediction_head":
            return encoder_depth + decoder_depth + 1
        case _:
            return 0


def stage_one_optimizer(model: PairVPR, *, layerwise_decay: float, patch_embed_lr_mult: float) -> AdamW:
    """AdamW over the trainable parameters, one group per pair of multipliers. `set_rates` sets the rates."""
    multipliers = stage_one_multipliers(model, layerwise_decay=layerwise_decay, patch_embed_lr_mult=patch_embed_lr_mult)
    return _adamw(model, multipliers)


def stage_two_optimizer(model: PairVPR) -> AdamW:
    """AdamW over the trainable parameters in one group: no layer-wise decay, weight decay on every parameter."""
    return _adamw(model, {name: Multipliers(1.0, 1.0) for name, _ in model.named_parameters()})


def _adamw(model: PairVPR, multipliers: Mapping[str, Multipliers]) -> AdamW:
    members: dict[Multipliers, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[multipliers[name]].append(parameter)
    groups = [
        {"params": parameters, "lr_multiplier": factors.lr, "weight_decay_multiplier": factors.weight_decay}
        for factors, parameters in members.items()
    ]
    is_fused = any(parameter.is_cuda for parameter in model.parameters()) or None
    return AdamW(groups, lr=0.0, betas=BETAS, weight_decay=0.0, fused=is_fused)


def fused_alike(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """A checkpoint's state for an optimizer that may run on another kind of device than the one that was saved."""
    (fused,) = {group["fused"] for group in optimizer.param_groups}
    return {**state, "param_groups": [{**group, "fused": fused} for group in state["param_groups"]]}


def set_rates(optimizer: Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set every group's rates for the next step, times its multipliers."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = weight_decay * group["weight_decay_multiplier"]


def scaled_lr(lr: float, global_batch_size: int) -> float:
    """Stage one's base learning rate: `lr` is for a batch of 1024 and scales with the square root of the batch size."""
    return lr * math.sqrt(global_batch_size / REFERENCE_BATCH_SIZE)


def warmup_cosine(step: int, *, base: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """Value at `step`: linear from 0 to `base`, reached by the last warm-up step, then `cosine` to `final`."""
    if step < warmup_steps:
        return base * step / max(warmup_steps - 1, 1)
    return cosine(step - warmup_steps, start=base, end=final, total_steps=total_steps - warmup_steps)


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """Value at `step` on half a cosine wave from `start` (step 0) to `end` (from `total_steps` on)."""
    if step >= total_steps:
        return end
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * step / total_steps))


def linear_decay(step: int, *, base: float, end_factor: float, decay_steps: int) -> float:
    """Value at `step`: linear from `base` to `base * end_factor` at `decay_steps`, constant afterwards."""
    return base * (1 + (end_factor - 1) * min(step, decay_steps) / decay_steps)
