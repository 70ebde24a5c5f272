"""The work that re-ranking benchmarks time: the published procedure written plainly, and ours. Needs torch alone.

K candidates, L patches, C encoder width, S image side in pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.config.schema import DecoderConfig, EncoderConfig, Ffn, ModelConfig, Precision
from pairvpr.models.linear import to_sixteen_bits
from pairvpr.models.pair_scorer import ALL_REUSE, Reuse
from pairvpr.models.pair_vpr import AUTOCAST_DTYPES, PairVPR, normalise
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.features import FeatureCache, PhotoFeatures
from pairvpr.retrieval.rerank import Reranker, WorkUnit

ENCODERS = {
    "vits": EncoderConfig(embed_dim=384, num_heads=6),
    "vitb": EncoderConfig(),
    "vitl": EncoderConfig(embed_dim=1024, depth=24, num_heads=16),
    "vitg": EncoderConfig(embed_dim=1536, depth=40, num_heads=24, ffn=Ffn.swiglu),
}
SHAKE = 0.02
NO_REUSE = Reuse(memory=False, first_attention=False, last_row=False)
REUSES = {
    "none": NO_REUSE,
    "memory": replace(NO_REUSE, memory=True),
    "first_attention": replace(NO_REUSE, first_attention=True),
    "last_row": replace(NO_REUSE, last_row=True),
    "all": ALL_REUSE,
}


def network(
    name: str, device: torch.device, precision: Precision = Precision.fp32, decoder_depth: int = 12, side_px: int = 322
) -> PairVPR:
    """A network of this size with random weights, moved so that pairs differ; as `build_model` makes it."""
    config = ModelConfig(
        name=name,
        image_size_px=side_px,
        precision=precision,
        encoder=ENCODERS[name],
        decoder=DecoderConfig(depth=decoder_depth),
    )
    torch.manual_seed(0)
    with device:
        model = PairVPR(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(SHAKE * torch.randn_like(parameter))
    if precision is not Precision.fp32:
        to_sixteen_bits(model, AUTOCAST_DTYPES[precision])
    return model


def plain(model: PairVPR, dense_query: Tensor, dense_candidates: Tensor) -> Tensor:
    """The published loop for one query, in fp32: its features (L, C) repeated K times, both directions, whole decoder.

    With gradients enabled (there are none to keep) every layer is torch's own, none of `pairvpr.models.linear`.
    """
    with torch.enable_grad():
        repeated = dense_query.repeat(len(dense_candidates), 1, 1)
        return model.pair_logits(repeated, dense_candidates) + model.pair_logits(dense_candidates, repeated)


def plain_dense(model: PairVPR, pixels: NDArray[np.uint8]) -> Tensor:
    """Dense features (L, C) of one photo (S, S, 3), by torch's own layers."""
    with torch.enable_grad():
        return model.describe(normalise(torch.from_numpy(pixels)[None].to(next(model.parameters()).device)))[1][0]


def ours(
    model: PairVPR, dense_query: Tensor, dense_candidates: Tensor, *, batch_size: int, reuse: Reuse = ALL_REUSE
) -> Tensor:
    """Scores (K,) of one query by the `Reranker`, in the order given."""
    with torch.inference_mode():

        def embedded(features: Tensor, ids: Sequence[int]) -> Iterator[Tensor]:
            return (model.embed(features[image_id][None])[0] for image_id in ids)

        reranker = Reranker(
            model,
            batch_size=batch_size,
            query_features=partial(embedded, dense_query[None]),
            database_features=partial(embedded, dense_candidates),
            reuse=reuse,
        )
        (answer,) = reranker.rerank(WorkUnit(0, {0: range(len(dense_candidates))}))
    scores = torch.empty(len(dense_candidates))
    scores[torch.from_numpy(answer.ids)] = torch.from_numpy(answer.pair_scores)
    return scores


@dataclass(frozen=True)
class City:
    """Pixels (S, S, 3) of queries and candidates; every query has all candidates."""

    queries: Sequence[NDArray[np.uint8]]
    database: Sequence[NDArray[np.uint8]]


def random_city(num_queries: int, num_candidates: int, side_px: int) -> City:
    """Noise: the network takes as long for it as for photos."""
    generator = np.random.default_rng(0)
    queries, database = (
        [generator.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8) for _ in range(number)]
        for number in (num_queries, num_candidates)
    )
    return City(queries, database)


def plain_city(model: PairVPR, city: City, *, keeps_features: bool) -> dict[int, Tensor]:
    """Every query's scores by the plain loop; its features are kept, or made again for each query."""
    kept: dict[int, Tensor] = {}

    def dense(image_id: int) -> Tensor:
        if image_id in kept:
            return kept[image_id]
        features = plain_dense(model, city.database[image_id])
        if keeps_features:
            kept[image_id] = features
        return features

    return {
        query_id: plain(model, plain_dense(model, pixels), torch.stack([dense(i) for i in range(len(city.database))]))
        for query_id, pixels in enumerate(city.queries)
    }


def our_city(
    model: PairVPR, city: City, *, batch_size: int, queries_per_unit: int, cache_bytes: int
) -> dict[int, Tensor]:
    """The same by the `Reranker` with a cache, in units of so many queries."""
    describer = Describer(model)
    cache = FeatureCache(cache_bytes)
    reranker = Reranker(
        model,
        batch_size=batch_size,
        query_features=PhotoFeatures(city.queries.__getitem__, describer.embedded, device=describer.device),
        database_features=PhotoFeatures(
            city.database.__getitem__, describer.embedded, device=describer.device, cache=cache
        ),
    )
    found: dict[int, Tensor] = {}
    for first in range(0, len(city.queries), queries_per_unit):
        query_ids = range(first, min(first + queries_per_unit, len(city.queries)))
        for answer in reranker.rerank(WorkUnit(0, {query_id: range(len(city.database)) for query_id in query_ids})):
            scores = torch.empty(len(answer.ids))
            scores[torch.from_numpy(answer.ids)] = torch.from_numpy(answer.pair_scores)
            found[answer.query_id] = scores
    return found


def largest_difference(one: Mapping[int, Tensor], other: Mapping[int, Tensor]) -> float:
    """Between two cities' scores."""
    return max(float((one[query_id].cpu() - other[query_id].cpu()).abs().max()) for query_id in one)
