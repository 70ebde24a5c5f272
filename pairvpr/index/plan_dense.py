"""What dense features cost in each mode, before a run: photos described, hours, bytes on storage.

How much the candidates of different queries overlap is not known beforehand, so every number is an upper bound: it
assumes that no two queries share a candidate, as far as the number of photos allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from pairvpr.config.schema import ModelConfig
from pairvpr.index.plan import size_text

HALF_BYTES = 2


class DenseWay(StrEnum):
    """The values of rerank.dense_features, and a store of the whole database (rerank.store_whole_database)."""

    recompute = "recompute"
    cache = "cache"
    store = "store"
    store_whole_database = "store_whole_database"


@dataclass(frozen=True, kw_only=True)
class DenseCost:
    """Upper bounds: database photos described for re-ranking, and bytes stored at 16 bits per value."""

    way: DenseWay
    described_at_most: int
    hours_at_most: float | None
    stored_bytes_at_most: int


@dataclass(frozen=True, kw_only=True)
class DenseRun:
    """A run of `num_queries` queries with `num_candidates` each, and the cheapest mode if nothing overlaps."""

    num_queries: int
    num_candidates: int
    ways: list[DenseCost]
    cheapest: DenseWay


def plan_dense(
    num_images: int, num_queries: int, num_candidates: int, model: ModelConfig, images_per_s: float | None
) -> DenseRun:
    """Costs of every mode; `images_per_s` is the rate at which the whole cluster describes with Pair-VPR's network.

    The cheapest mode describes the fewest photos; ties go to the one that stores less, then to a cache.
    """
    asked = num_queries * min(num_candidates, num_images)
    union = min(num_images, asked)
    record_bytes = HALF_BYTES * model.num_patches * model.decoder.embed_dim
    described = {
        DenseWay.recompute: asked,
        DenseWay.cache: asked,
        DenseWay.store: union,
        DenseWay.store_whole_database: num_images,
    }
    ways = [
        DenseCost(
            way=way,
            described_at_most=number,
            hours_at_most=None if images_per_s is None else number / images_per_s / 3600,
            stored_bytes_at_most=record_bytes * number if way in _STORES else 0,
        )
        for way, number in described.items()
    ]
    return DenseRun(num_queries=num_queries, num_candidates=num_candidates, ways=ways, cheapest=_cheapest(ways))


_STORES = (DenseWay.store, DenseWay.store_whole_database)
_PREFERRED = (DenseWay.cache, DenseWay.recompute, *_STORES)


def _cheapest(ways: Sequence[DenseCost]) -> DenseWay:
    best = min(ways, key=lambda cost: (cost.described_at_most, cost.stored_bytes_at_most, _PREFERRED.index(cost.way)))
    return best.way


def dense_table(run: DenseRun) -> str:
    """The costs for people."""
    lines = [
        f"dense features of {run.num_queries:,} queries with {run.num_candidates:,} candidates each, at most:",
        f"{'rerank.dense_features':<22}{'photos described':>18}{'hours':>12}   stored",
    ]
    for cost in run.ways:
        hours = "?" if cost.hours_at_most is None else f"{cost.hours_at_most:,.2f}"
        stored = size_text(cost.stored_bytes_at_most) if cost.stored_bytes_at_most else "nothing"
        lines.append(f"{cost.way:<22}{cost.described_at_most:>18,}{hours:>12}   {stored}")
    lines += [
        f"cheapest if no two queries share a candidate: {run.cheapest}. The more they share, the less cache and store "
        "describe",
        "(one photo at a time, so slower than the hours say; int8 stores half). store_whole_database is for several "
        "runs.",
    ]
    return "\n".join(lines)
