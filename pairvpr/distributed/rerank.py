"""Re-ranking in a supervised pool of actors; each finished unit is a file, so a resumed run skips it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pairvpr.config.schema import RerankConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Benchmark, check_photos_are_seen
from pairvpr.distributed.pool import PoolActor, SupervisedPool
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import ModelSource, plan_actors
from pairvpr.errors import IncompleteRunError
from pairvpr.retrieval.decision import Weights
from pairvpr.retrieval.dense_store import DenseStore
from pairvpr.retrieval.pipeline import photo_reranker
from pairvpr.retrieval.rerank import Reranked, WorkUnit

FAILED_UNITS = "failed_units.json"
NUM_FAILURES_NAMED = 5


@dataclass(frozen=True)
class RerankResult:
    """Every unit's answers by query id, and the seconds of work they took."""

    by_query: dict[int, Reranked]
    seconds: float
    lost: Lost


@dataclass
class Lost:
    """Photos that could not be read, with reasons: queries by query id, candidates by image id."""

    queries: dict[int, str] = field(default_factory=dict)
    candidates: dict[int, str] = field(default_factory=dict)


def rerank(
    units: Sequence[WorkUnit],
    benchmark: Benchmark,
    source: ModelSource,
    config: RerankConfig,
    directory: str,
    store: str | None = None,
    stop_margin: float | None = None,
    changed: Mapping[int, str] | None = None,
    weights: Weights | None = None,
) -> RerankResult:
    """Score all units; `directory` (path or URL) keeps a file for each finished one under `reranked/`.

    `store` (path or URL) is a finished store of dense features that has those of all candidates. At
    `stop_margin` a query's re-ranking stops early; `weights` are those of the evidence (see `Reranker`). A database
    photo that can't be read or has `changed` (by image id, with what is said of it) is not scored, and is named in the
    result.
    Raises `IncompleteRunError`, after everything else is done, if units failed for good; `failed_units.json`
    then names their queries.
    """
    pending = {unit.unit: unit for unit in unfinished(units, directory)}
    num_queries = sum(len(unit.candidates) for unit in units)
    num_pending = sum(len(unit.candidates) for unit in pending.values())
    progress = Progress("re-rank", num_queries, "queries", already_done=num_queries - num_pending)
    failed: dict[int, str] = {}
    if pending:
        plan = plan_actors(config)
        args = (source, ray.put(benchmark), config, directory, store, stop_margin, changed, weights)
        make_actor = _RerankActor.options(**plan.actor_options()).remote
        num_actors = min(plan.num_actors, len(pending))
        with SupervisedPool[WorkUnit](lambda: make_actor(*args), num_actors, "re-rank") as pool:
            failed = pool.run(pending, lambda key, _: progress.add(len(pending[key].candidates)))
    _report_failures(failed, pending, benchmark, directory)
    progress.finish()
    return _read_units(directory, (unit.unit for unit in units))


def unfinished(units: Sequence[WorkUnit], directory: str) -> list[WorkUnit]:
    """Those whose answers are not in `directory` yet."""
    finished = set(storage.list_files(storage.join(directory, "reranked")))
    return [unit for unit in units if unit_name(unit.unit) not in finished]


def unit_name(unit: int) -> str:
    """File name of a unit's answers."""
    return f"{unit:06d}.parquet"


@ray.remote
class _RerankActor(PoolActor):
    """Describes photos or reads their features, scores pairs, and publishes each unit before it reports it done."""

    def __init__(
        self,
        source: ModelSource,
        benchmark: Benchmark,
        config: RerankConfig,
        directory: str,
        store: str | None,
        stop_margin: float | None,
        changed: Mapping[int, str] | None,
        weights: Weights | None,
    ) -> None:
        self.directory = directory
        self.benchmark = benchmark
        stored = None if store is None else DenseStore.open(store).read
        describer = source.describer(config.num_threads_per_actor)
        self.reranker = photo_reranker(benchmark, describer, config, stored, stop_margin, changed, weights)

    def run(self, unit: WorkUnit) -> None:
        started_s = time.perf_counter()
        answers = self.reranker.rerank(unit)
        candidates = {image_id for row in unit.candidates.values() for image_id in row}
        lost = Lost(
            _only(self.reranker.lost_queries, unit.candidates), _only(self.reranker.lost_candidates, candidates)
        )
        if lost.queries:
            check_photos_are_seen(self.benchmark.queries)
        if lost.candidates:
            check_photos_are_seen(self.benchmark.database)
        _write_unit(self.directory, unit.unit, answers, time.perf_counter() - started_s, lost)


def _only(reasons: Mapping[int, str], image_ids: Collection[int]) -> dict[int, str]:
    return {image_id: reasons[image_id] for image_id in sorted(reasons.keys() & set(image_ids))}


def _write_unit(directory: str, unit: int, answers: Sequence[Reranked], seconds: float, lost: Lost) -> None:
    metadata = {"seconds": repr(seconds)}
    if lost.queries or lost.candidates:
        metadata["lost"] = json.dumps(asdict(lost))
    table = pa.table(
        {
            "query_id": pa.array([answer.query_id for answer in answers], pa.int64()),
            "reranked": pa.array([answer.ids for answer in answers], pa.list_(pa.int64())),
            "pair_scores": pa.array([answer.pair_scores for answer in answers], pa.list_(pa.float32())),
        }
    ).replace_schema_metadata(metadata)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_bytes(storage.join(directory, "reranked", unit_name(unit)), sink.getvalue())


def _read_units(directory: str, units: Iterable[int]) -> RerankResult:
    by_query: dict[int, Reranked] = {}
    seconds, lost = 0.0, Lost()
    for unit in units:
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(directory, "reranked", unit_name(unit)))))
        columns = (table.column(name) for name in ("query_id", "reranked", "pair_scores"))
        for query_id, ids, scores in zip(*columns, strict=True):
            answer = Reranked(query_id.as_py(), ids.values.to_numpy(), scores.values.to_numpy())
            by_query[answer.query_id] = answer
        metadata = table.schema.metadata or {}
        seconds += float(metadata[b"seconds"])
        for name, reasons in json.loads(metadata.get(b"lost", b"{}")).items():
            getattr(lost, name).update({int(image_id): reason for image_id, reason in reasons.items()})
    return RerankResult(by_query, seconds, lost)


def _report_failures(failed: dict[int, str], units: dict[int, WorkUnit], benchmark: Benchmark, directory: str) -> None:
    url = storage.join(directory, FAILED_UNITS)
    if not failed:
        storage.remove_file(url)
        return
    rows = [
        {
            "unit": key,
            "queries": [benchmark.queries.path(query) for query in units[key].candidates],
            "error": error,
        }
        for key, error in sorted(failed.items())
    ]
    storage.write_json(url, rows)
    named = "; ".join(
        f"unit {row['unit']} ({', '.join(row['queries'])}): {row['error']}" for row in rows[:NUM_FAILURES_NAMED]
    )
    more = f"; and {len(rows) - NUM_FAILURES_NAMED} more" if len(rows) > NUM_FAILURES_NAMED else ""
    raise IncompleteRunError(
        f"{len(rows)} of the re-ranking units failed three times: {named}{more}; all are listed in {url}. "
        "Everything else is kept: the same line again tries only these"
    )
