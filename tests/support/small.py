"""A network of a few thousand weights and the configurations around it, for tests that want answers, not recall."""

from __future__ import annotations

import torch

from pairvpr.config.benchmark_schema import ToyCityConfig
from pairvpr.config.schema import (
    DecoderConfig,
    DescribeBothConfig,
    EncoderConfig,
    EvaluateConfig,
    IndexConfig,
    ModelConfig,
    RerankConfig,
)
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights import build_model, load_weights

PUBLIC = (
    *("msls_val", "msls_test", "nordland_2760", "nordland_27592", "pitts30k_val", "pitts30k_test", "pitts250k_test"),
    *("tokyo247", "sfxl_v1", "sfxl_v2", "sfxl_night", "sfxl_occlusion", "st_lucia", "svox", "svox_night"),
    *("svox_overcast", "svox_rain", "svox_snow", "svox_sun", "amstertime", "eynsham", "sped"),
)
"""Every benchmark that is downloaded."""
SMALL_CITY = ToyCityConfig(name="toy_city", num_places=6, photos_per_place=3, queries_per_place=1)


def small_model_config(weights: str | None = None, depth: int = 1) -> ModelConfig:
    """4 patches, one block in the encoder, `depth` in the decoder, every part of the full network."""
    return ModelConfig(
        name="small",
        image_size_px=28,
        descriptor_dim=16,
        weights=weights,
        encoder=EncoderConfig(
            embed_dim=32, depth=1, num_heads=2, num_registers=2, pretrain_image_size_px=28, num_trainable_blocks=1
        ),
        decoder=DecoderConfig(embed_dim=32, depth=depth, num_heads=2),
    )


def small_model(depth: int = 1) -> PairVPR:
    """The untrained small network on the CPU."""
    config = small_model_config(depth=depth)
    return build_model(config, load_weights(config), torch.device("cpu"))


def shaken_model(depth: int = 1) -> PairVPR:
    """The small network with its weights moved, so that photos and pairs differ clearly."""
    network = small_model(depth)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


def small_evaluate_config(output: str, *, num_candidates: int = 5, num_retrieved: int = 10) -> EvaluateConfig:
    """An evaluation of `SMALL_CITY` in batches that do not divide the number of photos."""
    return EvaluateConfig(
        output=output,
        benchmark=SMALL_CITY,
        model=small_model_config(),
        describe=DescribeBothConfig(batch_size=4, num_threads_per_actor=1),
        index=IndexConfig(num_retrieved=num_retrieved, num_threads_per_actor=1),
        rerank=RerankConfig(num_candidates=num_candidates, batch_size=3, queries_per_unit=2, num_threads_per_actor=1),
    )
