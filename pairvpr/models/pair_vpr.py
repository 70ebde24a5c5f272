"""Pair-VPR (Hausler and Moghadam, RA-L 2025): describe images, score pairs of them, reconstruct masked ones.

B batch, L patches, C encoder width, D decoder width, G descriptor width, S image side in pixels, P patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairvpr.config.schema import IMAGENET_MEAN, IMAGENET_STD, ModelConfig, Precision
from pairvpr.models.attention import engine
from pairvpr.models.linear import Linear
from pairvpr.models.pair_decoder import DecoderBlock
from pairvpr.models.pos_embed import sine_cosine_2d
from pairvpr.models.vit import LAYER_NORM_EPS, VisionTransformer, run_block

CLASSIFIER_WIDTH = 512
AUTOCAST_DTYPES = {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait until it is there, so it may not be changed any more."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def normalise(pixels: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(B, S, S, 3) uint8 RGB -> (B, 3, S, S) float32, scaled to [0, 1], less `mean`, divided by `std`."""
    images = pixels.permute(0, 3, 1, 2).to(torch.float32) / 255
    return (images - _channels(mean, pixels.device)) / _channels(std, pixels.device)


def _channels(values: Sequence[float], device: torch.device) -> Tensor:
    """(1, C, 1, 1), filled on the device: it would have to wait for a copy from the host."""
    return torch.cat([torch.full((1, 1, 1, 1), value, device=device) for value in values], dim=1)


class Encoder(nn.Module):
    """Holder of the ViT under the published prefix `encoder.model.`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = VisionTransformer(config.encoder, config.patch_size_px)


class PairVPR(nn.Module):
    """The network of both training stages and of inference.

    `describe`: images (B, 3, S, S) -> global descriptors (B, G) of unit length and dense features (B, L, C).
    `pair_logits`: dense features of first and second images, (B, L, C) each -> logits (B,); higher = same place.
    `embed` and `pair_logits_of_embedded` are its two halves: the first is per image, the second per pair.
    `score_pairs`: the sum of both directions, which re-ranking sorts by.
    `reconstruct`: stage one's prediction of a masked image from an unmasked one of the same place.

    With `pair_classifier_token=False` it is the stage-one network: no class token in the decoder.
    Weights are those of torch's constructors until `pairvpr.models.weights` fills them in.
    """

    mask_token: Tensor
    dec_pos_embed: Tensor
    dec_pos_embed_cls: Tensor

    def __init__(self, config: ModelConfig, *, pair_classifier_token: bool = True) -> None:
        super().__init__()
        self.config = config
        dim, decoder_dim = config.encoder.embed_dim, config.decoder.embed_dim
        grid_size = config.image_size_px // config.patch_size_px
        if pair_classifier_token:
            self.decoder_clstoken = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        # Never used, but part of the published state dicts.
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        table = sine_cosine_2d(decoder_dim, grid_size)
        if pair_classifier_token:
            self.register_buffer("dec_pos_embed_cls", torch.cat([torch.zeros(1, decoder_dim), table]))
        self.register_buffer("dec_pos_embed", table)
        self.encoder = Encoder(config)
        self.decoder_embed = Linear(dim, decoder_dim)
        self.dec_blocks = nn.ModuleList(
            DecoderBlock(decoder_dim, config.decoder.num_heads) for _ in range(config.decoder.depth)
        )
        self.dec_norm = nn.LayerNorm(decoder_dim, eps=LAYER_NORM_EPS)
        self.prediction_head = nn.Linear(decoder_dim, config.patch_size_px**2 * 3)
        self.classvprmodule = nn.Sequential(
            nn.Linear(decoder_dim, CLASSIFIER_WIDTH), nn.ReLU(), nn.Linear(CLASSIFIER_WIDTH, 1)
        )
        self.globalizer = nn.Sequential(nn.Linear(dim, config.descriptor_dim))

    @property
    def checkpoint_activations(self) -> bool:
        """Whether training recomputes the activations of encoder and decoder blocks instead of keeping them."""
        return self.encoder.model.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, recompute: bool) -> None:
        self.encoder.model.checkpoint_activations = recompute

    def describe(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, S, S) -> global descriptors (B, G) float32, dense features (B, L, C)."""
        with self.autocast(images.device):
            class_token, dense = self.encoder.model(images)
        with self._full_precision(images.device):
            return F.normalize(self.globalizer(class_token.float()), dim=-1), dense

    def pair_logits(self, dense_first: Tensor, dense_second: Tensor) -> Tensor:
        """Dense features (B, L, C) of both images of each pair -> logits (B,) float32. Direction matters."""
        with self.autocast(dense_first.device):
            return self.pair_logits_of_embedded(self.embed(dense_first), self.embed(dense_second))

    def embed(self, dense: Tensor) -> Tensor:
        """Dense features (B, L, C) -> what the pair decoder reads of an image: (B, L, D), 16-bit under autocast."""
        with self.autocast(dense.device):
            return self.decoder_embed(dense)

    def pair_logits_of_embedded(self, x_first: Tensor, x_second: Tensor) -> Tensor:
        """`embed`'s output (B, L, D) for both images of each pair -> logits (B,) float32."""
        with self.autocast(x_first.device):
            x = self._decode(self.first_sequence(x_first), self.second_sequence(x_second))
            return self.classify(x[:, 0])

    def first_sequence(self, embedded: Tensor) -> Tensor:
        """(B, L, D) -> (B, 1 + L, D): a pair's first image as the decoder reads it, with class token and positions."""
        class_token = self.decoder_clstoken.expand(len(embedded), -1, -1).to(embedded.dtype)
        return torch.cat([class_token, embedded], dim=1) + self.dec_pos_embed_cls

    def second_sequence(self, embedded: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D): a pair's second image as the decoder's memory, with positions."""
        return embedded + self.dec_pos_embed

    def classify(self, class_tokens: Tensor) -> Tensor:
        """The class token's rows (B, D) after the last block -> logits (B,) float32, never rounded to 16 bits."""
        with self._full_precision(class_tokens.device):
            return self.classvprmodule(self.dec_norm(class_tokens.float())).squeeze(-1)

    def score_pairs(self, dense_query: Tensor, dense_candidates: Tensor) -> Tensor:
        """logit(query, candidate) + logit(candidate, query): (B,) float32 for (B, L, C) each."""
        return self.pair_logits(dense_query, dense_candidates) + self.pair_logits(dense_candidates, dense_query)

    def reconstruct(self, images_masked: Tensor, images_other: Tensor, mask: Tensor) -> Tensor:
        """Stage one: patches (B, L, P * P * 3) of the first image, its patches under `mask` (B, L) hidden."""
        with self.autocast(images_masked.device):
            _, dense_masked = self.encoder.model(images_masked, mask)
            _, dense_other = self.encoder.model(images_other)
            x = self.decoder_embed(dense_masked) + self.dec_pos_embed
            x = self._decode(x, self.decoder_embed(dense_other) + self.dec_pos_embed)
            return self.prediction_head(self.dec_norm(x))

    def _decode(self, x: Tensor, memory: Tensor) -> Tensor:
        for block in self.dec_blocks:
            x = run_block(block, x, memory, recompute=self.checkpoint_activations)
        return x

    def attention_engine(self) -> str:
        """The name of what runs the pair decoder's attention in inference, where the network is."""
        decoder = self.config.decoder
        tokens = self.dec_pos_embed.new_empty(
            (1, len(self.dec_pos_embed_cls), decoder.num_heads, decoder.embed_dim // decoder.num_heads),
            dtype=AUTOCAST_DTYPES.get(self.config.precision, torch.float32),
        )
        with torch.inference_mode():
            return engine(tokens, tokens, tokens, compiled=self.config.compile)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """16-bit matrix products under autocast; norms, softmax and the residual stream stay in fp32."""
        dtype = AUTOCAST_DTYPES.get(self.config.precision)
        return nullcontext() if dtype is None else torch.autocast(device.type, dtype)

    def _full_precision(self, device: torch.device) -> AbstractContextManager[object]:
        """For the few products whose results are sorted: in 16 bits they would tie."""
        return nullcontext() if self.config.precision is Precision.fp32 else torch.autocast(device.type, enabled=False)
