"""recall@N of the global descriptor during training: every rank describes some of the batches.

G descriptor width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.data.photo_batches import load_batch, num_batches
from pairvpr.errors import UserError
from pairvpr.evaluation.recall import recall_at
from pairvpr.index.search import Shard, flat_index, search
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.retrieval.describe import Describer
from pairvpr.training.context import TrainContext

VALIDATED_N = (1, 5, 10)


def validate(model: PairVPR, benchmark: Benchmark, batch_size: int, context: TrainContext) -> dict[str, float]:
    """`recall@N` in percent for N = 1, 5, 10, over all queries. Every rank calls it and gets the same result."""
    if benchmark.positives is None:
        raise UserError(
            f"train.validation={benchmark.name}: it has no ground truth; expected a benchmark with positives"
        )
    describer = Describer(model)
    database_ids, database = _described(benchmark.database, describer, batch_size, context)
    query_ids, queries = _described(benchmark.queries, describer, batch_size, context)
    num_kept = min(max(VALIDATED_N), len(database_ids))
    _, found = search(Shard(flat_index(database), database_ids), queries, num_kept, num_threads=1)
    ranked = [np.empty(0, np.int64)] * len(benchmark.queries)
    for query_id, row in zip(query_ids, found, strict=True):
        ranked[int(query_id)] = row
    recalls = recall_at(ranked, benchmark.positives, VALIDATED_N)
    return {f"recall@{n}": value for n, value in recalls.items()}


def _described(
    manifest: Manifest, describer: Describer, batch_size: int, context: TrainContext
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids (n,), ascending, and descriptors (n, G) of the readable photos; batch b is described by rank b mod W."""
    mine = []
    for number in range(context.rank, num_batches(len(manifest), batch_size), context.world_size):
        batch = load_batch(manifest, number, batch_size, describer.model.config)
        mine.append((number, *batch.kept(describer.descriptors(batch.pixels))))
    everything = sorted((part for parts in context.gather(mine) for part in parts), key=lambda part: part[0])
    return np.concatenate([ids for _, ids, _ in everything]), np.concatenate([rows for _, _, rows in everything])
