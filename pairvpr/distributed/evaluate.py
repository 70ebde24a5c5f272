"""The main job: describe -> index -> retrieve -> re-rank -> report, each step finished before the next.

Everything that can be wrong with what a user gave is found by `prepare`, before a file is written or Ray starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from pairvpr.config.schema import DenseFeatures, EvaluateConfig, RerankConfig
from pairvpr.data import storage
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.claim import check_claim, check_writable, claim, differences
from pairvpr.data.manifest import Benchmark
from pairvpr.distributed.build import index_settings, make_index
from pairvpr.distributed.dense import KEY as STORE_KEY
from pairvpr.distributed.dense import WantedStore, about_store, check_sharing, check_store, make_store
from pairvpr.distributed.describe import Description, describe
from pairvpr.distributed.progress import say
from pairvpr.distributed.rerank import rerank, unfinished
from pairvpr.distributed.retrieve import Candidates, retrieve
from pairvpr.distributed.runtime import ModelSource, ray_session
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.evaluation.confidence import Calibration, Judge, read_calibration
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.evaluation.report import RunFacts, metrics, summary
from pairvpr.evaluation.submission import write_submission
from pairvpr.index import choose, store
from pairvpr.index.filters import Filters, Places
from pairvpr.index.manifest import IndexManifest, check_model, read_images, read_manifest
from pairvpr.index.reader import live_ids
from pairvpr.models.weights import NOT_LOADED, Weights, announce, load_weights
from pairvpr.retrieval.dense_store import Layout
from pairvpr.retrieval.pipeline import answers
from pairvpr.retrieval.rerank import SCORING, WorkUnit, work_units

OF_THE_WEIGHTS = ("model.weights_sha256",)
OF_THE_INDEX = (
    *("num_retrieved", "num_probes", "num_threads_per_actor"),
    *("kind", "memory_budget_gib", "target_recall", "num_lists", "num_build_threads"),
)
"""Settings of an index that decide what is found in it."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One benchmark, checked and ready to run. `index` and `output` are absolute paths or URLs."""

    config: EvaluateConfig
    benchmark: Benchmark
    weights: Weights
    index: str
    output: str
    calibration: Calibration | None = None
    """The content of rerank.calibration."""

    @property
    def judge(self) -> Judge | None:
        """How sure the run is of its answers."""
        found = self.calibration
        if found is None:
            return None
        return Judge(found.temperature, found.midpoint, self.config.rerank.not_in_map_below)

    @property
    def stop_margin(self) -> float | None:
        """Where the re-ranking of a query stops early."""
        return self.calibration.stop_margin if self.calibration and self.config.rerank.adaptive else None

    @property
    def store(self) -> WantedStore | None:
        """The store of dense features that the run re-ranks from, if it is to have one."""
        settings = self.config.rerank
        if settings.dense_features is not DenseFeatures.store:
            return None
        return WantedStore(
            url=storage.absolute(settings.store_path or storage.join(self.output, "dense")),
            model=self.index_settings()["model"],
            layout=Layout.of_model(self.config.model, settings.stored_as),
            database=self.benchmark.database,
            config=settings,
        )

    @property
    def num_shards(self) -> int:
        """Shards of the database's index."""
        return self.config.index.num_shards or choose.default_num_shards(len(self.benchmark.database))

    def index_settings(self) -> dict[str, Any]:
        """What decides the bytes of the index."""
        return index_settings(
            self.benchmark.database, self.num_shards, self.config.model, self.weights, self.config.describe
        )

    def settings(self) -> dict[str, Any]:
        """What decides the bytes of the predictions."""
        return self.index_settings() | {
            "benchmark": {"name": self.benchmark.name} | self.benchmark.stamp(),
            "queries": {"root": self.benchmark.queries.root},
            "index": {
                "path": self.index,
                **{name: getattr(self.config.index, name) for name in OF_THE_INDEX},
            },
            "rerank": {
                name: getattr(self.config.rerank, name)
                for name in ("num_candidates", "batch_size", "queries_per_unit", "num_threads_per_actor")
            }
            | {"scoring": SCORING}
            | self._unusual_settings(),
        }

    def _unusual_settings(self) -> dict[str, float | str]:
        """What most runs don't ask for."""
        values = {
            "second_direction": self.config.rerank.second_direction,
            "stored_as": None if self.store is None else str(self.config.rerank.stored_as),
            "temperature": self.calibration and self.calibration.temperature,
            "midpoint": self.calibration and self.calibration.midpoint,
            "not_in_map_below": self.config.rerank.not_in_map_below,
            "stop_margin": self.stop_margin,
        }
        return {name: value for name, value in values.items() if value is not None}


def prepare(configs: Sequence[EvaluateConfig]) -> list[Run]:
    """Check all benchmarks of a run; writes nothing. Those of a list get folders of their own and share the weights."""
    outputs = [storage.absolute(config.output) for config in configs]
    if len(configs) > 1 or configs[0].benchmarks:
        outputs = [storage.join(output, config.benchmark.name) for output, config in zip(outputs, configs, strict=True)]
    indices = [
        storage.absolute(config.index.path or storage.join(output, "index"))
        for config, output in zip(configs, outputs, strict=True)
    ]
    for output, index in zip(outputs, indices, strict=True):
        check_writable(output, "output")
        if read_manifest(index) is None:
            check_writable(index, "index.path")
        if index in (output, storage.join(output, "queries")):
            raise UserError(f"index.path={index}: the run writes other files there; expected a directory of its own")
    calibration = calibrated(configs[0].rerank)
    runs: list[Run] = []
    for config, benchmark, output, index in zip(configs, _load(configs, outputs), outputs, indices, strict=True):
        run = Run(
            config=config,
            benchmark=benchmark,
            weights=NOT_LOADED,
            index=index,
            output=output,
            calibration=calibration,
        )
        check_calibration(run, OF_THE_WEIGHTS)
        _check_claims(run, OF_THE_WEIGHTS)
        _check_photos(run)
        check_dense_store(run, OF_THE_WEIGHTS)
        if any(other.index == index and other.index_settings() != run.index_settings() for other in runs):
            raise UserError(
                f"index.path={index}: these benchmarks have different databases; expected an index for each"
            )
        runs.append(run)
    check_sharing([run.store for run in runs if run.store is not None])
    weights = load_weights(configs[0].model)
    runs = [replace(run, weights=weights) for run in runs]
    for run in runs:
        check_calibration(run)
        _check_claims(run)
        _check_model(run)
        check_dense_store(run)
    return runs


def calibrated(config: RerankConfig) -> Calibration | None:
    """The calibration that re-ranking is to use; raises `UserError` where it can't."""
    if config.calibration is None:
        return None
    found = read_calibration(config.calibration)
    if config.adaptive:
        found.check_rounds(config.calibration, config.batch_size)
    return found


def check_calibration(run: Run, ignored: Sequence[str] = ()) -> None:
    """Raise `UserError` unless the run's network is the calibrated one; settings that are `ignored` may differ."""
    if run.calibration is not None:
        run.calibration.check(str(run.config.rerank.calibration), run.index_settings()["model"], ignored)


def _load(configs: Sequence[EvaluateConfig], outputs: Sequence[str]) -> list[Benchmark]:
    """The benchmarks. Equal databases become one object: each may list millions of photos."""
    found: list[Benchmark] = []
    for config, output in zip(configs, outputs, strict=True):
        benchmark = load_benchmark(config.benchmark, output)
        database = benchmark.database
        for other in found:
            if other.database.root == database.root and other.database.table.equals(database.table):
                database = other.database
        found.append(replace(benchmark, database=database))
    return found


def _check_claims(run: Run, ignored: Sequence[str] = ()) -> None:
    check_claim(run.output, run.settings(), "output", ignored)
    check_claim(run.index, run.index_settings(), "index.path", ignored)


def _check_photos(run: Run) -> None:
    """Raise `UserError` unless a finished index holds the run's database, also where its settings.json is gone."""
    manifest = read_manifest(run.index)
    if manifest is None:
        return
    database = run.benchmark.database
    there = {
        "generation's updates": len(manifest.images) - 1 + len(manifest.removed),
        "images_root": manifest.images_root,
        "num_images": manifest.num_images,
        "num_shards": len(manifest.shards),
        "descriptor_dim": manifest.descriptor_dim,
    }
    here = {
        "generation's updates": 0,
        "images_root": database.root,
        "num_images": len(database),
        "num_shards": run.num_shards,
        "descriptor_dim": run.config.model.descriptor_dim,
    }
    found = differences(there, here)
    if not found and not storage.exists(storage.join(run.index, SETTINGS_FILE)):
        names_there = read_images(run.index, manifest).paths_sha256
        found = differences({"paths_sha256": names_there}, {"paths_sha256": database.paths_sha256})
    if found:
        raise UserError(
            f"index.path={run.index}: the finished index there is another one: {'; '.join(found)}; "
            "expected an index of this database, or another directory"
        )


def _check_model(run: Run) -> None:
    """Raise `UserError` unless the run's model made a finished index."""
    manifest = read_manifest(run.index)
    if manifest is None:
        return
    check_model(
        run.index,
        manifest,
        name=run.config.model.name,
        weights_sha256=run.weights.sha256,
        model=run.index_settings()["model"],
    )


def check_dense_store(run: Run, ignored: Sequence[str] = ()) -> None:
    """Raise `UserError` where the run's store of dense features is another one, or is no directory of its own.

    Settings whose dotted names are `ignored` may differ.
    """
    wanted = run.store
    if wanted is None:
        return
    if wanted.url in (run.output, run.index, storage.join(run.output, "queries")):
        raise UserError(f"{STORE_KEY}={wanted.url}: the run writes other files there; expected a directory of its own")
    check_store(wanted, ignored)


def evaluate(configs: Sequence[EvaluateConfig]) -> list[dict[str, Any]]:
    """Run one benchmark or several; prints a table for each and returns the contents of their metrics.json.

    Raises `IncompleteRunError` for the benchmarks in which work failed for good, when all others are done.
    """
    runs = prepare(configs)
    announce(configs[0].model, runs[0].weights)
    for run in runs:
        claim(run.output, run.settings(), "output")
        if read_manifest(run.index) is None:
            claim(run.index, run.index_settings(), "index.path")
    reports: list[dict[str, Any]] = []
    incomplete: list[str] = []
    with ray_session(configs[0].cluster):
        for run in runs:
            prepare_benchmark(run.config.benchmark, run.output)
        source = ModelSource(configs[0].model, ray.put(runs[0].weights))
        for run in runs:
            database, settings = run.benchmark.database, run.index_settings()
            try:
                manifest = make_index(
                    database, run.index, run.num_shards, source, run.config.describe, run.config.index, settings
                )
                reports.append(answer(run, source, manifest))
            except IncompleteRunError as error:
                say(f"{run.benchmark.name}: incomplete: {error}")
                incomplete.append(f"{run.benchmark.name}: {error}")
    if incomplete:
        raise IncompleteRunError("; ".join(incomplete))
    return reports


def answer(
    run: Run, source: ModelSource, manifest: IndexManifest, filters: tuple[Filters, Places] | None = None
) -> dict[str, Any]:
    """Describe the queries, retrieve, re-rank, and write the predictions, a challenge's submission, metrics.json.

    `manifest` is the generation of the index that is searched, `filters` what each query may find in it.
    """
    config, benchmark = run.config, run.benchmark
    queries = storage.join(run.output, "queries")
    describe(
        Description(benchmark.queries, queries, 1, source, config.describe), "queries", needs_a_readable_photo=False
    )
    num_kept = max(config.rerank.num_candidates, config.index.num_retrieved)
    url = storage.join(run.output, "candidates.parquet")
    found = retrieve(run.index, manifest, queries, num_kept, config.index, url, filters)
    queries_about = store.read_description(queries)
    assert queries_about is not None
    num_candidates = min(config.rerank.num_candidates, manifest.num_live)
    if num_candidates < config.rerank.num_candidates:
        say(
            f"rerank.num_candidates={config.rerank.num_candidates}: the database has {manifest.num_live} readable "
            "photos, all of them are re-ranked"
        )
    units = work_units(_first_candidates(found, num_candidates), config.rerank.queries_per_unit)
    store_url = _stored_candidates(run, units, source, manifest)
    scored = rerank(units, replace(benchmark, positives=None), source, config, run.output, store_url, run.stop_margin)

    candidates = {int(query_id): found.of(row) for row, query_id in enumerate(found.query_ids)}
    final = answers(len(benchmark.queries), candidates, scored.by_query)
    table = predictions_table(benchmark, final, run.judge)
    write_predictions(storage.join(run.output, "predictions.parquet"), table)
    submission = write_submission(run.output, benchmark, final) if benchmark.has_submission else []
    facts = RunFacts(
        weights_sha256=run.weights.sha256,
        untrained=run.weights.untrained,
        num_candidates=num_candidates,
        seconds_describe=queries_about["seconds"],
        seconds_retrieve=found.seconds,
        seconds_rerank=scored.seconds,
        num_rejected_database=manifest.num_rejected,
        num_rejected_queries=queries_about["num_rejected"],
        report_candidates=config.rerank.report_candidates,
        second_direction=config.rerank.second_direction,
        judge=run.judge,
        dense_store=None if run.store is None else about_store(run.store),
        index=about_index(manifest, config.index.num_probes),
    )
    content = metrics(benchmark, final, config.model, facts)
    storage.write_json(storage.join(run.output, "metrics.json"), content)
    files = ", ".join(["predictions.parquet", *submission, "metrics.json"])
    print(f"\n{summary(content)}\n\n{run.output}: {files}", flush=True)
    return content


def _stored_candidates(run: Run, units: Sequence[WorkUnit], source: ModelSource, manifest: IndexManifest) -> str | None:
    """Where the features of all candidates are stored, as long as there are units to score; None without a store."""
    wanted, pending = run.store, unfinished(units, run.output)
    if wanted is None or not pending:
        return None
    ids = {image_id for unit in units for row in unit.candidates.values() for image_id in row}
    candidates = np.array(sorted(ids), np.int64)
    make_store(wanted, candidates, lambda: live_ids(run.index, manifest), source)
    return wanted.url


def _first_candidates(found: Candidates, num_candidates: int) -> dict[int, list[int]]:
    return {int(query_id): found.of(row)[0][:num_candidates].tolist() for row, query_id in enumerate(found.query_ids)}


def about_index(manifest: IndexManifest, num_probes: int | None) -> dict[str, Any]:
    """What a report says of the index: an approximate one with the recall that it was measured to have."""
    effort = manifest.effort if num_probes is None else manifest.effort | {"num_probes": num_probes}
    recall = None if manifest.measured is None or num_probes is not None else manifest.measured["recall"]
    return {
        "kind": manifest.kind,
        "factory": manifest.factory,
        "generation": manifest.generation,
        "effort": effort,
        "recall_of_exact_nearest": recall,
    }
