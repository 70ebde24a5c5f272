"""Steps shared by jobs: build an index, answer queries. Each step finishes before the next one starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import BuildConfig, BuildIndexConfig, EvaluateConfig
from pairvpr.data import sealed, stamps, storage
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.capacity import node_rooms, room
from pairvpr.distributed.dense import about_store, make_store
from pairvpr.distributed.describe import Description, describe, source_of
from pairvpr.distributed.index import RayRunner
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.rerank import Lost, RerankResult, rerank, unfinished
from pairvpr.distributed.retrieve import retrieve
from pairvpr.distributed.runtime import cluster_memory_bytes
from pairvpr.errors import UserError
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.evaluation.report import RunFacts, metrics, summary
from pairvpr.evaluation.submission import write_submission
from pairvpr.index import choose, descriptor_shards, make
from pairvpr.index.described import CHANGED, DescribedPhotos, described_tables
from pairvpr.index.filters import Filters, Places
from pairvpr.index.generations import IndexManifest, commit, read_manifest
from pairvpr.index.plan import check_fits, plan_index
from pairvpr.index.reader import live_ids
from pairvpr.index.reduction import check_width, reduced
from pairvpr.retrieval.decision import Decider
from pairvpr.retrieval.first_stage import FirstStage
from pairvpr.retrieval.pipeline import answers, decided, with_prior
from pairvpr.retrieval.rerank import WorkUnit, work_units
from pairvpr.secrets import without_secrets
from pairvpr.terminal import say
from ray_jobs.run import GivenCandidates, Run

SHARE_OF_MEMORY = 0.5
"""Share of the cluster's memory that an index may take by default."""


def ensure_index(
    database: Manifest,
    directory: str,
    num_shards: int,
    first: FirstStage,
    network: ModelSource | None,
    config: BuildIndexConfig | EvaluateConfig,
) -> IndexManifest:
    """Describe the database and build its index in a claimed directory, or resume doing so.

    `network` is Pair-VPR's, where the job has it.
    """
    index = config.index
    finished = read_manifest(directory)
    if finished is not None and make.is_wanted(finished, index):
        stamps.check_unchanged(database, directory)
        say("index: finished earlier, skipped")
        return finished
    if finished is not None and not storage.has_atomic_creation(directory):
        raise UserError(
            f"{directory}: the finished index is {finished.kind} ({finished.factory}); this storage can't keep "
            "two writers apart; expected pairvpr update_index index.kind=... single_writer=true"
        )
    check_width(index.reduce_to, first.width)
    budget_bytes = memory_budget_bytes(index)
    plan = plan_index(
        len(database),
        replace(config.model, descriptor_dim=first.width),
        replace(index, num_shards=num_shards),
        budget_bytes=budget_bytes,
    )
    check_fits(plan, room(directory), index)
    photos = Description(database, directory, num_shards, source_of(first, network), config.describe)
    describe(photos, "database", needs_a_readable_photo=True)
    if finished is None:
        made_by = {"name": first.name, "weights_sha256": first.weights_sha256}
        draft = make.first_generation(directory, database, num_shards, made_by, first.width)
        if index.reduce_to is not None:
            draft = reduced(directory, draft, index.reduce_to, RayRunner())
    else:
        draft = replace(finished, generation=finished.generation + 1)
    manifest = make.next_generation(directory, draft, index, budget_bytes, RayRunner())
    commit(directory, manifest)
    return manifest


def memory_budget_bytes(config: BuildConfig) -> float:
    """Bytes that all shards together may take in search."""
    if config.memory_budget_gib is not None:
        return config.memory_budget_gib * choose.GIB
    if not node_rooms():
        raise UserError(
            "the cluster has no memory until it scales up; expected index.memory_budget_gib, which all shards of "
            "the index may take together in search"
        )
    return SHARE_OF_MEMORY * cluster_memory_bytes()


def about_generation(manifest: IndexManifest) -> str:
    """A generation in one line."""
    recall = "exact" if manifest.measured is None else f"recall {manifest.measured['recall']} of the exact nearest"
    return (
        f"index: generation {manifest.generation}, {manifest.num_live:,} photos in {len(manifest.shards)} shards, "
        f"{manifest.kind} ({manifest.factory}), {recall}"
    )


@dataclass(frozen=True)
class _Found:
    """Candidates by query id: ids and squared distances, best first, of which the first few are re-ranked.

    And what finding them took.
    """

    candidates: Mapping[int, tuple[NDArray[np.int64], NDArray[np.float32]]]
    num_reranked: int
    seconds_describe: float = 0.0
    seconds_retrieve: float = 0.0
    num_rejected: int = 0
    num_remarked: int = 0


def answer(
    run: Run, source: ModelSource | None, manifest: IndexManifest | None, filters: tuple[Filters, Places] | None = None
) -> dict[str, Any]:
    """Find each query's candidates, re-rank, and write the predictions, a challenge's submission, metrics.json.

    `manifest` is the index generation to search; `filters` limits what each query may find. Where candidates are given
    instead, it is the one that the database photos are from, if any. `source` is the network, where the run needs one.
    """
    config, benchmark = run.config, run.benchmark
    found = _retrieved(run, source, manifest, filters) if run.given is None else _given(run, run.given)
    scored = _scored(run, source, manifest, found)

    final = answers(len(benchmark.queries), found.candidates, scored.by_query)
    if run.decision is not None:
        final = decided(final, Decider(run.decision, benchmark.database.utm_m))
    write_predictions(storage.join(run.output, "predictions.parquet"), predictions_table(benchmark, final, run.judge))
    submission = write_submission(run.output, benchmark, final) if benchmark.has_submission else []
    content = metrics(benchmark, final, config.model, _facts(run, manifest, found, scored))
    sealed.write_json(storage.join(run.output, "metrics.json"), content)
    files = ", ".join(["predictions.parquet", *submission, "metrics.json"])
    print(without_secrets(f"\n{summary(content)}\n\n{run.output}: {files}"), flush=True)
    print(without_secrets(f"see it: pairvpr report {run.output}"), flush=True)
    return content


def _retrieved(
    run: Run, source: ModelSource | None, manifest: IndexManifest | None, filters: tuple[Filters, Places] | None
) -> _Found:
    """Describe the queries, and find their candidates in the index."""
    assert manifest is not None, "candidates that are not given come from an index"
    config, directory = run.config, storage.join(run.output, "queries")
    rows = run.query_file or source_of(run.first, source)
    queries = Description(run.benchmark.queries, directory, 1, rows, config.describe)
    describe(queries, "queries", needs_a_readable_photo=False)
    num_kept = config.index.num_kept(config.rerank.num_candidates)
    url = storage.join(run.output, "candidates.parquet")
    found = retrieve(run.index, manifest, directory, num_kept, config.index, url, filters)
    num_reranked = min(config.rerank.num_candidates, manifest.num_live)
    if num_reranked < config.rerank.num_candidates:
        say(
            f"rerank.num_candidates={config.rerank.num_candidates}: the database has {manifest.num_live} readable "
            "photos, all of them are re-ranked"
        )
    about = descriptor_shards.read_description(directory)
    assert about is not None
    return _Found(
        {int(query_id): found.of(row) for row, query_id in enumerate(found.query_ids)},
        num_reranked,
        about.seconds,
        found.seconds,
        about.num_rejected,
        len(descriptor_shards.read_remarks(directory)),
    )


def _given(run: Run, given: GivenCandidates) -> _Found:
    """The candidates of a file, whose distances are not known."""
    asked, queries = run.config.rerank.num_candidates, run.benchmark.queries
    most = max(map(len, given.by_query.values()))
    if most < asked:
        say(f"rerank.num_candidates={asked}: no query has more than {most} candidates, all of them are re-ranked")
    missing = [query_id for query_id in range(len(queries)) if query_id not in given.by_query]
    if missing:
        say(
            f"rerank.candidates: {len(missing):,} of {len(queries):,} queries have none and stay unanswered, the first "
            f"is {queries.path(missing[0])}"
        )
    unknown = {query_id: np.full(len(ids), np.nan, np.float32) for query_id, ids in given.by_query.items()}
    return _Found({query_id: (ids, unknown[query_id]) for query_id, ids in given.by_query.items()}, min(asked, most))


def _scored(run: Run, source: ModelSource | None, manifest: IndexManifest | None, found: _Found) -> RerankResult:
    """Re-rank the first of each query's candidates."""
    if not found.num_reranked:
        return RerankResult({}, 0.0, Lost())
    assert source is not None
    first = {query_id: ids[: found.num_reranked].tolist() for query_id, (ids, _) in found.candidates.items()}
    units = work_units(first, run.config.rerank.queries_per_unit)
    changed = {} if manifest is None else _changed_candidates(run, units, manifest)
    store_url = _stored_candidates(run, units, source, manifest)
    weights = None if run.decision is None else run.decision.weights
    return rerank(
        with_prior(units, found.candidates, weights),
        replace(run.benchmark, positives=None),
        source,
        run.config.rerank,
        run.output,
        store_url,
        run.stop_margin,
        changed,
        weights,
    )


def _facts(run: Run, manifest: IndexManifest | None, found: _Found, scored: RerankResult) -> RunFacts:
    """The report's facts about a run, besides its answers."""
    database, settings = run.benchmark.database, run.config.rerank
    return RunFacts(
        weights_sha256=None if run.weights is None else run.weights.sha256,
        untrained=run.weights is not None and run.weights.untrained,
        first_stage=run.first.entry,
        num_candidates=found.num_reranked,
        seconds_describe=found.seconds_describe,
        seconds_retrieve=found.seconds_retrieve,
        seconds_rerank=scored.seconds,
        num_rejected_database=0 if manifest is None else manifest.num_rejected,
        num_rejected_queries=found.num_rejected + len(scored.lost.queries),
        num_remarked={
            "database": 0 if manifest is None else _num_remarked(run.index, manifest),
            "queries": found.num_remarked,
        },
        attention=scored.attention,
        unscored={database.path(i): reason for i, reason in sorted(scored.lost.candidates.items())},
        report_candidates=settings.report_candidates,
        second_direction=settings.second_direction,
        judge=run.judge,
        decision=settings.decision,
        dense_store=None if run.store is None else about_store(run.store),
        index=None if run.given is not None or manifest is None else about_index(manifest, run.config.index.num_probes),
    )


def _changed_candidates(run: Run, units: Sequence[WorkUnit], manifest: IndexManifest) -> dict[int, str]:
    """Candidates whose photos have changed since they were indexed: a reason by id."""
    pending = unfinished(units, run.output)
    candidates = np.array(sorted({i for unit in pending for row in unit.candidates.values() for i in row}), np.int64)
    changed = DescribedPhotos(run.index, manifest, run.benchmark.database).changed(candidates)
    if len(changed):
        say(f"index: {len(changed):,} candidates have changed since they were described, and are not scored")
    return dict.fromkeys(changed.tolist(), CHANGED)


def _num_remarked(index: str, manifest: IndexManifest) -> int:
    return sum(len(descriptor_shards.read_remarks(directory)) for _, directory in described_tables(index, manifest))


def _stored_candidates(
    run: Run, units: Sequence[WorkUnit], source: ModelSource, manifest: IndexManifest | None
) -> str | None:
    """The store with the features of all candidates, while there are units to score; None without a store."""
    wanted, pending = run.store, unfinished(units, run.output)
    if wanted is None or not pending:
        return None
    ids = {image_id for unit in units for row in unit.candidates.values() for image_id in row}
    candidates = np.array(sorted(ids), np.int64)
    everything = np.arange(len(run.benchmark.database))
    make_store(wanted, candidates, lambda: everything if manifest is None else live_ids(run.index, manifest), source)
    return wanted.url


def about_index(manifest: IndexManifest, num_probes: int | None) -> dict[str, Any]:
    """The report's entry on the index; for an approximate one, with its measured recall."""
    effort = manifest.effort if num_probes is None else manifest.effort | {"num_probes": num_probes}
    recall = None if manifest.measured is None or num_probes is not None else manifest.measured["recall"]
    return {
        "kind": manifest.kind,
        "factory": manifest.factory,
        "generation": manifest.generation,
        "effort": effort,
        "recall_of_exact_nearest": recall,
    }
