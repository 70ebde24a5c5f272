"""Re-ranking: score each (query, candidate) pair and sort, best first. Needs only torch.

L patches, D decoder width, K candidates. The direction of a pair says which image comes first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pairvpr.errors import UserError
from pairvpr.models.compiled import filled
from pairvpr.models.pair_scorer import ALL_REUSE, Memory, PairScorer, Reuse
from pairvpr.models.pair_vpr import PairVPR, sent
from pairvpr.retrieval.decision import Weights
from pairvpr.retrieval.early_stop import margin

Features: TypeAlias = Callable[[Sequence[int]], Iterator[Tensor]]
"""`PairVPR.embed`'s output (L, D) of photos, in the order of their ids, on the model's device."""

SCORING = 3
"""Incremented when the same settings give other units, forward passes or rounding, so no run resumes with a mixture."""
QUERY_FIRST, CANDIDATE_FIRST = 0, 1
MOST_QUERIES_OF_A_HUB = 1000
"""A photo that is a candidate of more queries than this says little about which queries are neighbours."""


@dataclass(frozen=True)
class Reranked:
    """A query's candidates after re-ranking: ids (K,) int64 and pair scores (K,) float32, best first.

    A score is the sum of both directions' logits, or twice the one logit of a candidate scored only with the query
    first, or minus infinity if it was not scored. Both arrays are empty for a query photo that can't be read.
    """

    query_id: int
    ids: NDArray[np.int64]
    pair_scores: NDArray[np.float32]


@dataclass(frozen=True)
class WorkUnit:
    """Queries scored together: for each query id its candidates' ids, in retrieval order."""

    unit: int
    candidates: Mapping[int, Sequence[int]]
    prior: Mapping[int, NDArray[np.float64]] | None = None
    """For each query, the evidence (K,) of its candidates before scoring; None = there is none."""


def work_units(candidates: Mapping[int, Sequence[int]], queries_per_unit: int) -> list[WorkUnit]:
    """Group queries that share candidates into units, and order units by what they share.

    A unit starts with the query that shares most candidates with the previous unit. It then adds, one by one, the query
    that shares most with its own candidates. Ties, and queries that share none, are taken in order.
    """
    queries_of: dict[int, list[int]] = {}
    for query_id, image_ids in candidates.items():
        for image_id in set(image_ids):
            queries_of.setdefault(image_id, []).append(query_id)
    rank = {query_id: number for number, query_id in enumerate(candidates)}
    left = dict.fromkeys(candidates)
    units: list[WorkUnit] = []
    shared: Counter[int] = Counter()
    while left:
        unit: dict[int, Sequence[int]] = {}
        known: set[int] = set()
        while left and len(unit) < queries_per_unit:
            chosen = min(shared, key=lambda query_id: (-shared[query_id], rank[query_id]), default=None)
            if chosen is None:
                chosen = next(iter(left))
            if not unit:
                shared = Counter()  # from here on, with this unit
            unit[chosen] = candidates[chosen]
            del left[chosen]
            new = set(candidates[chosen]) - known
            known |= new
            for image_id in new:
                neighbours = queries_of[image_id]
                if len(neighbours) <= MOST_QUERIES_OF_A_HUB:
                    shared.update(query_id for query_id in neighbours if query_id in left)
            shared.pop(chosen, None)
        units.append(WorkUnit(len(units), unit))
    return units


class Reranker:
    """Scores work units.

    `query_features` and `database_features` yield the decoder's input for photos, each distinct candidate of the unit
    once. `second_direction` is the number of candidates per query, the best with the query first, that a second pass
    scores in the other direction (None = all). With `stop_margin`, a query's candidates are scored `batch_size` at a
    time, one pass each, until its margin reaches it. Each pass requests its photos again. "Best" and the margin are by
    evidence: the pair scores, or with `weights` the pair scores and the unit's `prior`. The scores themselves do not
    depend on the evidence.

    A compiled network (model.compile) gets passes of one shape: `queries_per_unit` queries, `batch_size` candidates and
    pairs, the first ones again where there are fewer.

    `lost_queries` and `lost_candidates` name photos that can't be read, by id. They may grow while photos are loaded,
    with placeholders in their place. A lost candidate is not scored; a lost query is not answered.
    """

    def __init__(
        self,
        model: PairVPR,
        *,
        batch_size: int,
        query_features: Features,
        database_features: Features,
        second_direction: int | None = None,
        stop_margin: float | None = None,
        weights: Weights | None = None,
        reuse: Reuse = ALL_REUSE,
        queries_per_unit: int = 1,
        lost_queries: Mapping[int, str] | None = None,
        lost_candidates: Mapping[int, str] | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.second_direction = second_direction
        self.stop_margin = stop_margin
        self.weights = weights
        self._scorer = PairScorer(model, reuse)
        self._queries_per_unit = queries_per_unit
        self.lost_queries = {} if lost_queries is None else lost_queries
        self.lost_candidates = {} if lost_candidates is None else lost_candidates
        self._query_features = query_features
        self._database_features = database_features

    @torch.inference_mode()
    def rerank(self, unit: WorkUnit) -> list[Reranked]:
        """Every query of the unit, in its order."""
        asked = [query_id for query_id, candidates in unit.candidates.items() if len(candidates)]
        scores = {query_id: np.empty(0, np.float32) for query_id in unit.candidates}
        if asked:
            embedded = torch.stack(list(self._query_features(asked)))
            if self.model.config.compile:
                embedded = filled(embedded, self._queries_per_unit)
            queries = _Queries(self._scorer.as_first(embedded), self._scorer.as_memory(embedded, keep=True))
            scores |= self._scores({query_id: unit.candidates[query_id] for query_id in asked}, queries, unit.prior)
        return [
            _sorted(query_id, unit.candidates[query_id], its)
            if query_id not in self.lost_queries
            else Reranked(query_id, np.empty(0, np.int64), np.empty(0, np.float32))
            for query_id, its in scores.items()
        ]

    def _scores(
        self,
        candidates: Mapping[int, Sequence[int]],
        queries: _Queries,
        prior: Mapping[int, NDArray[np.float64]] | None,
    ) -> dict[int, NDArray[np.float32]]:
        """Pair scores (K,) of every query, in retrieval order."""

        def evidence(row: int, scores: NDArray[np.float32]) -> NDArray[np.float32]:
            """Evidence (n,) of a query's first n candidates, from their pair scores."""
            if self.weights is None or prior is None:
                return scores
            return self.weights.evidence(scores, prior[query_ids[row]][: len(scores)]).astype(np.float32)

        query_ids = list(candidates)
        pairs = [
            _Pair(row, place, image_id)
            for row, ids in enumerate(candidates.values())
            for place, image_id in enumerate(ids)
        ]
        logits = [np.full((2, len(ids)), -np.inf, np.float32) for ids in candidates.values()]
        if self.stop_margin is not None:
            self._score_in_rounds(pairs, queries, logits, self.stop_margin, evidence)
        elif self.second_direction is not None:
            self._score(pairs, queries, logits, (QUERY_FIRST,))
            best = [_best(evidence(row, _sums(its)), self.second_direction) for row, its in enumerate(logits)]
            self._score([pair for pair in pairs if pair.place in best[pair.row]], queries, logits, (CANDIDATE_FIRST,))
        else:
            self._score(pairs, queries, logits, (QUERY_FIRST, CANDIDATE_FIRST))
        return {query_id: _sums(its) for query_id, its in zip(candidates, logits, strict=True)}

    def _score_in_rounds(
        self,
        pairs: Sequence[_Pair],
        queries: _Queries,
        logits: Sequence[NDArray[np.float32]],
        stop_margin: float,
        evidence: Callable[[int, NDArray[np.float32]], NDArray[np.float32]],
    ) -> None:
        """Score `batch_size` candidates at a time for each query whose margin is still too small."""
        is_left = [True] * len(logits)
        for first in range(0, max(its.shape[1] for its in logits), self.batch_size):
            places = range(first, first + self.batch_size)
            some = [pair for pair in pairs if pair.place in places and is_left[pair.row]]
            self._score(some, queries, logits, (QUERY_FIRST, CANDIDATE_FIRST))
            is_left = [
                left and its.shape[1] > places.stop and margin(evidence(row, _sums(its)[: places.stop])) < stop_margin
                for row, (left, its) in enumerate(zip(is_left, logits, strict=True))
            ]

    def _score(
        self,
        pairs: Sequence[_Pair],
        queries: _Queries,
        logits: Sequence[NDArray[np.float32]],
        directions: Sequence[int],
    ) -> None:
        """Fill in the logits (2, K) of these pairs, in these directions.

        A forward pass holds all pairs of some candidates, up to `batch_size` pairs, so that a candidate's part is
        computed once for all its queries. Results stay on the device until the end, so that it never waits.
        """
        found: list[Tensor] = []
        batches = _batches(pairs, self.batch_size)
        image_ids = list(dict.fromkeys(pair.image_id for batch in batches for pair in batch))
        features = iter(zip(image_ids, self._database_features(image_ids), strict=True))
        held: dict[int, Tensor] = {}
        for batch in batches:
            needed = list(dict.fromkeys(pair.image_id for pair in batch))
            held = {image_id: held[image_id] for image_id in needed if image_id in held}
            held |= (next(features) for _ in range(len(needed) - len(held)))
            found.append(self._logits(batch, torch.stack([held[image_id] for image_id in needed]), queries, directions))
        for pair, its in zip((pair for batch in batches for pair in batch), _checked(found, self.model), strict=True):
            if pair.image_id not in self.lost_candidates:
                logits[pair.row][list(directions), pair.place] = its

    def _logits(self, batch: Sequence[_Pair], embedded: Tensor, queries: _Queries, directions: Sequence[int]) -> Tensor:
        """Logits (B, directions) of one forward pass; `embedded` (n, L, D) are its candidates, in order."""
        image_ids = list(dict.fromkeys(pair.image_id for pair in batch))
        places = [[image_ids.index(pair.image_id) for pair in batch], [pair.row for pair in batch]]
        in_place = places[0] == list(range(len(image_ids)))
        if self.model.config.compile:
            embedded, in_place = filled(embedded, self.batch_size), False
            places = [[*its, *[its[0]] * (self.batch_size - len(batch))] for its in places]
        candidate_of, query_of = sent(torch.tensor(places), embedded.device)
        if in_place:
            candidate_of = None
        scorer, found = self._scorer, []
        if QUERY_FIRST in directions:
            memory = scorer.as_memory(embedded, keep=False)
            found.append(scorer.logits(queries.first, query_of, memory, candidate_of))
        if CANDIDATE_FIRST in directions:
            found.append(scorer.logits(scorer.as_first(embedded), candidate_of, queries.memory, query_of))
        return torch.stack(found, dim=1)[: len(batch)]


@dataclass(frozen=True)
class _Queries:
    """The unit's queries, indexed by position in the unit: as first images and as memories."""

    first: Tensor
    memory: Memory


@dataclass(frozen=True)
class _Pair:
    """The query at a position in the unit, and the candidate at a position of that query."""

    row: int
    place: int
    image_id: int


def _batches(pairs: Sequence[_Pair], batch_size: int) -> list[list[_Pair]]:
    """Pairs cut into forward passes, candidate by candidate; one is split only if it exceeds a pass."""
    of_image: dict[int, list[_Pair]] = {}
    for pair in pairs:
        of_image.setdefault(pair.image_id, []).append(pair)
    batches: list[list[_Pair]] = []
    for its in of_image.values():
        for first in range(0, len(its), batch_size):
            piece = its[first : first + batch_size]
            if batches and len(batches[-1]) + len(piece) <= batch_size:
                batches[-1].extend(piece)
            else:
                batches.append(piece)
    return batches


def _checked(found: Sequence[Tensor], model: PairVPR) -> NDArray[np.float32]:
    """Logits (pairs, directions). Raises `UserError` if they are not finite."""
    logits = torch.cat(list(found)).cpu().numpy() if found else np.empty((0, 1), np.float32)
    if not np.isfinite(logits).all():
        raise UserError(
            f"pair scores are not finite at model.precision={model.config.precision}; expected sound weights, "
            "and fp32 or bf16, which can't overflow"
        )
    return logits


def _best(evidence: NDArray[np.float32], number: int) -> set[int]:
    """Positions of the highest evidence; ties by position."""
    return set(np.argsort(-evidence, kind="stable")[:number].tolist())


def _sums(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """(2, K) -> pair scores (K,); a candidate scored in only one direction counts that logit twice."""
    is_half = np.isneginf(logits[CANDIDATE_FIRST])
    return logits[QUERY_FIRST] + np.where(is_half, logits[QUERY_FIRST], logits[CANDIDATE_FIRST])


def _sorted(query_id: int, candidates: Sequence[int], scores: NDArray[np.float32]) -> Reranked:
    """Highest score first; ties keep retrieval order."""
    order = np.argsort(-scores, kind="stable")
    return Reranked(query_id, np.asarray(candidates, dtype=np.int64)[order], scores[order])
