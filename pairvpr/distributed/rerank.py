"""Re-ranking in a pool of actors; each finished unit is a file, so a resumed run skips it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

import numpy as np
import pyarrow as pa
import ray

from pairvpr.config.schema import RerankConfig
from pairvpr.data import sealed, storage
from pairvpr.data.manifest import Benchmark, check_photos_are_seen
from pairvpr.distributed.metrics import PAIRS
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.pool import PoolActor, SupervisedPool
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import plan_actors
from pairvpr.errors import IncompleteRunError
from pairvpr.retrieval.decision import Weights
from pairvpr.retrieval.dense_store import DenseStore
from pairvpr.retrieval.pipeline import photo_reranker
from pairvpr.retrieval.rerank import Reranked, WorkUnit
from pairvpr.terminal import say

STEP = "re-rank"
FAILED_UNITS = "failed_units.json"
NUM_FAILURES_NAMED = 5
UNITS_READ_AT_ONCE = 16
UNIT_SCHEMA = pa.schema(
    [("query_id", pa.int64()), ("reranked", pa.list_(pa.int64())), ("pair_scores", pa.list_(pa.float32()))]
)
MADE_ANEW = "its queries are scored again"


@dataclass(frozen=True)
class RerankResult:
    """Every unit's answers by query id, and the seconds of work they took."""

    by_query: dict[int, Reranked]
    seconds: float
    lost: Lost
    attention: str | None = None
    """What ran the pair decoder's attention, several engines by commas; None where that was not noted."""


@dataclass
class Lost:
    """Unreadable photos with reasons: queries by query id, candidates by image id."""

    queries: dict[int, str] = field(default_factory=dict)
    candidates: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class UnitFacts:
    """How a unit's answers came about."""

    seconds: float
    lost: Lost
    attention: str | None
    """See `RerankResult.attention`."""


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

    `store` (path or URL) is a finished store with the dense features of all candidates. A query's re-ranking stops
    early at `stop_margin`; `weights` are those of the evidence (see `Reranker`). A database photo that can't be read or
    has `changed` (a reason by image id) is not scored, and is named in the result.
    Raises `IncompleteRunError`, after everything else is done, if units failed for good; `failed_units.json`
    then names their queries.
    """
    pending = {unit.unit: unit for unit in unfinished(units, directory)}
    num_queries = sum(len(unit.candidates) for unit in units)
    num_pending = sum(len(unit.candidates) for unit in pending.values())
    failed: dict[int, str] = {}
    engines: set[str] = set()
    with Progress(STEP, num_queries, "queries", already_done=num_queries - num_pending) as progress:
        if pending:
            plan = plan_actors(config)
            args = (source, ray.put(benchmark), config, directory, store, stop_margin, changed, weights)
            make_actor = _RerankActor.options(**plan.actor_options()).remote
            num_actors = min(plan.num_actors, len(pending))
            with SupervisedPool[WorkUnit](lambda: make_actor(*args), num_actors, STEP) as pool:

                def on_done(key: int, engine: str) -> None:
                    if engine not in engines:
                        say(f"{STEP}: attention by {engine}")
                    engines.add(engine)
                    progress.add(len(pending[key].candidates))

                failed = pool.run(pending, on_done)
        _report_failures(failed, pending, benchmark, directory)
    return _read_units(directory, units)


def unfinished(units: Sequence[WorkUnit], directory: str) -> list[WorkUnit]:
    """Units whose answers are missing from `directory` or (with a warning) damaged."""
    finished = set(storage.list_files(storage.join(directory, "reranked")))

    def is_finished(unit: WorkUnit) -> bool:
        try:
            return unit_name(unit.unit) in finished and _read_unit(directory, unit) is not None
        except sealed.DamagedFileError as error:
            sealed.warn(error)
            return False

    with ThreadPoolExecutor(UNITS_READ_AT_ONCE) as pool:
        return [unit for unit, done in zip(units, pool.map(is_finished, units), strict=True) if not done]


def unit_name(unit: int) -> str:
    """File name of a unit's answers."""
    return f"{unit:06d}.parquet"


@ray.remote
class _RerankActor(PoolActor):
    """Computes or reads features, scores pairs, and publishes each unit before reporting it done."""

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
        self.engine = describer.model.attention_engine()

    def run(self, unit: WorkUnit) -> str:
        """Publish a unit's answers; returns what ran the attention."""
        started_s = time.perf_counter()
        answers = self.reranker.rerank(unit)
        PAIRS.record(sum(np.isfinite(answer.pair_scores).sum() for answer in answers), step=STEP)
        candidates = {image_id for row in unit.candidates.values() for image_id in row}
        lost = Lost(
            _only(self.reranker.lost_queries, unit.candidates), _only(self.reranker.lost_candidates, candidates)
        )
        if lost.queries:
            check_photos_are_seen(self.benchmark.queries)
        if lost.candidates:
            check_photos_are_seen(self.benchmark.database)
        about = UnitFacts(time.perf_counter() - started_s, lost, self.engine)
        _write_unit(self.directory, unit.unit, answers, about)
        return self.engine


def _only(reasons: Mapping[int, str], image_ids: Collection[int]) -> dict[int, str]:
    return {image_id: reasons[image_id] for image_id in sorted(reasons.keys() & set(image_ids))}


def _write_unit(directory: str, unit: int, answers: Sequence[Reranked], about: UnitFacts) -> None:
    metadata = {"seconds": repr(about.seconds)}
    if about.lost.queries or about.lost.candidates:
        metadata["lost"] = json.dumps(asdict(about.lost))
    if about.attention is not None:
        metadata["attention"] = about.attention
    table = pa.table(
        {
            "query_id": pa.array([answer.query_id for answer in answers], pa.int64()),
            "reranked": pa.array([answer.ids for answer in answers], pa.list_(pa.int64())),
            "pair_scores": pa.array([answer.pair_scores for answer in answers], pa.list_(pa.float32())),
        },
        schema=UNIT_SCHEMA,
    ).replace_schema_metadata(metadata)
    sealed.write_parquet(storage.join(directory, "reranked", unit_name(unit)), table)


def _read_unit(directory: str, unit: WorkUnit) -> tuple[list[Reranked], UnitFacts] | None:
    """A unit's answers and how they came about; None if there is no file.

    Raises `UserError` if the file is damaged or belongs to other queries or candidates.
    """
    url = storage.join(directory, "reranked", unit_name(unit.unit))
    table = sealed.read_parquet(url, UNIT_SCHEMA, MADE_ANEW)
    if table is None:
        return None
    rows = zip(*(table.column(name) for name in UNIT_SCHEMA.names), strict=True)
    try:
        answers = [
            Reranked(query_id.as_py(), ids.values.to_numpy(), scores.values.to_numpy())
            for query_id, ids, scores in rows
        ]
        metadata = table.schema.metadata or {}
        lost = {
            kind: {int(image_id): reason for image_id, reason in reasons.items()}
            for kind, reasons in json.loads(metadata.get(b"lost", b"{}")).items()
        }
        engine = metadata[b"attention"].decode() if b"attention" in metadata else None
        about = UnitFacts(float(metadata[b"seconds"]), Lost(**lost), engine)
    except (AttributeError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise sealed.DamagedFileError(url, storage.reason(error), MADE_ANEW) from error
    here = {answer.query_id: sorted(answer.ids.tolist()) for answer in answers}
    if here != {query_id: sorted(ids) for query_id, ids in unit.candidates.items()} or not math.isfinite(about.seconds):
        raise sealed.DamagedFileError(url, "it belongs to other queries or candidates", MADE_ANEW)
    if any(len(answer.ids) != len(answer.pair_scores) for answer in answers):
        raise sealed.DamagedFileError(url, "its scores do not fit its candidates", MADE_ANEW)
    return answers, about


def _read_units(directory: str, units: Iterable[WorkUnit]) -> RerankResult:
    by_query: dict[int, Reranked] = {}
    seconds, lost, engines = 0.0, Lost(), set[str]()
    for unit in units:
        found = _read_unit(directory, unit)
        if found is None:
            raise IncompleteRunError(f"{directory}: unit {unit.unit} is missing; run the same command again to redo it")
        by_query |= {answer.query_id: answer for answer in found[0]}
        about = found[1]
        seconds += about.seconds
        lost.queries.update(about.lost.queries)
        lost.candidates.update(about.lost.candidates)
        engines |= set() if about.attention is None else {about.attention}
    return RerankResult(by_query, seconds, lost, ", ".join(sorted(engines)) or None)


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
        "Everything else is kept: run the same command again to retry only these"
    )
