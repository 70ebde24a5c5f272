"""Re-ranking: score the candidates of a query pair by pair, best first. Needs torch alone.

L patches, C encoder width, K candidates.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.errors import UserError
from pairvpr.models.pair_vpr import PairVPR


@dataclass(frozen=True)
class Reranked:
    """A query's candidates after re-ranking: ids (K,) int64 and summed pair logits (K,) float32, best first."""

    query_id: int
    ids: NDArray[np.int64]
    pair_scores: NDArray[np.float32]


@dataclass(frozen=True)
class WorkUnit:
    """Queries scored together: for each query id its candidates' ids, in retrieval order."""

    unit: int
    candidates: Mapping[int, Sequence[int]]


def work_units(candidates: Mapping[int, Sequence[int]], queries_per_unit: int) -> list[WorkUnit]:
    """Consecutive queries cut into units; which queries share one depends on their order alone."""
    query_ids = list(candidates)
    return [
        WorkUnit(unit, {query_id: candidates[query_id] for query_id in query_ids[first : first + queries_per_unit]})
        for unit, first in enumerate(range(0, len(query_ids), queries_per_unit))
    ]


class FeatureCache:
    """Dense features by key, the least recently used dropped beyond `capacity_bytes`."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def get(self, key: Hashable) -> Tensor | None:
        """The features kept for `key`, if any."""
        if key in self._features:
            self._features.move_to_end(key)
        return self._features.get(key)

    def put(self, key: Hashable, features: Tensor) -> None:
        """Keep features; those of one key never change. Too large ones are not kept."""
        if key in self._features or features.nbytes > self.capacity_bytes:
            return
        self._features[key] = features
        self.used_bytes += features.nbytes
        while self.used_bytes > self.capacity_bytes:
            _, dropped = self._features.popitem(last=False)
            self.used_bytes -= dropped.nbytes


class Reranker:
    """Scores work units.

    `query_features` and `database_features` give a photo's dense features (L, C) on the model's device. Each is
    called at most once for a photo in a unit, and not at all for what `cache` still has from earlier units.
    """

    def __init__(
        self,
        model: PairVPR,
        *,
        batch_size: int,
        query_features: Callable[[int], Tensor],
        database_features: Callable[[int], Tensor],
        cache: FeatureCache,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.cache = cache
        self._query_features = query_features
        self._database_features = database_features

    @torch.inference_mode()
    def rerank(self, unit: WorkUnit) -> list[Reranked]:
        """Every query of the unit, in its order."""
        uses_left = Counter(image_id for candidates in unit.candidates.values() for image_id in candidates)
        features: dict[int, Tensor] = {}
        answers = []
        for query_id, candidates in unit.candidates.items():
            for image_id in candidates:
                if image_id not in features:
                    features[image_id] = self._cached(image_id)
            scores = self._score(self._query_features(query_id), [features[image_id] for image_id in candidates])
            answers.append(_sorted(query_id, candidates, scores))
            uses_left.subtract(candidates)
            features = {image_id: dense for image_id, dense in features.items() if uses_left[image_id]}
        return answers

    def _cached(self, image_id: int) -> Tensor:
        features = self.cache.get(image_id)
        if features is None:
            features = self._database_features(image_id)
            self.cache.put(image_id, features)
        return features

    def _score(self, query: Tensor, candidates: Sequence[Tensor]) -> NDArray[np.float32]:
        """Summed logits (K,) of both directions; forward passes hold `batch_size` pairs in retrieval order."""
        scores = [np.empty(0, np.float32)]
        for first in range(0, len(candidates), self.batch_size):
            batch = torch.stack(list(candidates[first : first + self.batch_size]))
            scores.append(self.model.score_pairs(query.expand_as(batch), batch).cpu().numpy())
        found = np.concatenate(scores)
        if not np.isfinite(found).all():
            raise UserError(
                f"pair scores are not finite at model.precision={self.model.config.precision}; expected sound weights, "
                "and fp32 or bf16, which can't overflow"
            )
        return found


def _sorted(query_id: int, candidates: Sequence[int], scores: NDArray[np.float32]) -> Reranked:
    """Highest score first; equal scores keep the order of retrieval."""
    order = np.argsort(-scores, kind="stable")
    return Reranked(query_id, np.asarray(candidates, dtype=np.int64)[order], scores[order])
