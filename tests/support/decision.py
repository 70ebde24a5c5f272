"""Queries drawn from a model: positives are better by score and by distance, and stand at one place."""

from __future__ import annotations

import numpy as np

from pairvpr.evaluation.fit_decision import LocatedQuery

K, PHOTOS_PER_PLACE = 12, 3


def drawn(
    number: int,
    *,
    pair: float = 0.8,
    distance: float = 12.0,
    clusters: bool = True,
    positions: bool = True,
    seed: int = 5,
) -> list[LocatedQuery]:
    """Queries whose positives are better by score and by distance, each as far as asked, and stand at one place."""
    rng = np.random.default_rng(seed)
    queries = []
    for _ in range(number):
        is_positive = np.zeros(K, np.bool_)
        if rng.random() < 0.93:
            is_positive[rng.permutation(K)[:PHOTOS_PER_PLACE]] = True
        scores = rng.normal(0, 1, K) + 1.5 * pair * is_positive
        distances = rng.normal(0.6, 0.1, K) - 0.1 * (distance / 8) * is_positive
        places = np.arange(K) if not clusters else np.where(is_positive, 0, np.arange(K))
        order = np.argsort(distances)
        utm_m = np.stack([100.0 * places, rng.normal(0, 2, K)], axis=1).astype(np.float64)
        queries.append(
            LocatedQuery(
                scores[order].astype(np.float32),
                is_positive[order],
                distances[order].astype(np.float32),
                utm_m[order] if positions else np.full((K, 2), np.nan),
            )
        )
    return queries
