"""The main job: describe -> index -> retrieve -> re-rank -> report, each step finished before the next.

Everything that can be wrong with what a user gave is found by `prepare`, before a file is written or Ray starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import ray

from pairvpr.config.schema import (
    BuildIndexConfig,
    DescribeConfig,
    EvaluateConfig,
    IndexConfig,
    ModelConfig,
    QueryConfig,
)
from pairvpr.data import storage
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.claim import check_claim, check_writable, claim, differences
from pairvpr.data.manifest import Benchmark, Manifest, folder_manifest
from pairvpr.distributed.describe import Description, describe
from pairvpr.distributed.index import Candidates, build_index, retrieve
from pairvpr.distributed.progress import say
from pairvpr.distributed.rerank import rerank
from pairvpr.distributed.runtime import ModelSource, ray_session
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.evaluation.predictions import predictions_table, write_predictions
from pairvpr.evaluation.report import RunFacts, metrics, summary
from pairvpr.evaluation.submission import write_submission
from pairvpr.index import store
from pairvpr.models.weights import Weights, announce, load_weights
from pairvpr.retrieval.pipeline import answers
from pairvpr.retrieval.rerank import work_units

IMAGES_PER_SHARD = 250_000
NOT_LOADED = Weights({}, "", untrained=False)
"""Stands for the weights while what is cheap to check is checked."""
OF_THE_WEIGHTS = ("model.weights_sha256",)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One benchmark, checked and ready to run. `index` and `output` are absolute paths or URLs."""

    config: EvaluateConfig
    benchmark: Benchmark
    weights: Weights
    index: str
    output: str

    @property
    def num_shards(self) -> int:
        """Shards of the database's index."""
        return self.config.index.num_shards or _default_num_shards(len(self.benchmark.database))

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
                "num_retrieved": self.config.index.num_retrieved,
                "num_threads_per_actor": self.config.index.num_threads_per_actor,
            },
            "rerank": {
                name: getattr(self.config.rerank, name)
                for name in ("num_candidates", "batch_size", "queries_per_unit", "num_threads_per_actor")
            },
        }


def index_settings(
    database: Manifest, num_shards: int, model: ModelConfig, weights: Weights, config: DescribeConfig
) -> dict[str, Any]:
    """What decides the bytes of an index, in plain values."""
    shape = asdict(model)
    del shape["weights"], shape["encoder"]["num_trainable_blocks"]
    return {
        "model": shape | {"weights_sha256": weights.sha256},
        "describe": {"batch_size": config.batch_size, "num_threads_per_actor": config.num_threads_per_actor},
        "database": {
            "root": database.root,
            "num_images": len(database),
            "paths_sha256": database.paths_sha256,
        },
        "index_num_shards": num_shards,
    }


def _default_num_shards(num_images: int) -> int:
    return -(-num_images // IMAGES_PER_SHARD)


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
        if store.read_manifest(index) is None:
            check_writable(index, "index.path")
        if index in (output, storage.join(output, "queries")):
            raise UserError(f"index.path={index}: the run writes other files there; expected a directory of its own")
    runs: list[Run] = []
    for config, benchmark, output, index in zip(configs, _load(configs, outputs), outputs, indices, strict=True):
        run = Run(config=config, benchmark=benchmark, weights=NOT_LOADED, index=index, output=output)
        _check_claims(run, OF_THE_WEIGHTS)
        _check_photos(run)
        if any(other.index == index and other.index_settings() != run.index_settings() for other in runs):
            raise UserError(
                f"index.path={index}: these benchmarks have different databases; expected an index for each"
            )
        runs.append(run)
    weights = load_weights(configs[0].model)
    runs = [replace(run, weights=weights) for run in runs]
    for run in runs:
        _check_claims(run)
        _check_model(run)
    return runs


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
    manifest = store.read_manifest(run.index)
    if manifest is None:
        return
    database = run.benchmark.database
    there = {
        "images_root": manifest.images_root,
        "num_images": manifest.num_images,
        "num_shards": len(manifest.shards),
        "descriptor_dim": manifest.descriptor_dim,
    }
    here = {
        "images_root": database.root,
        "num_images": len(database),
        "num_shards": run.num_shards,
        "descriptor_dim": run.config.model.descriptor_dim,
    }
    found = differences(there, here)
    if not found and not storage.exists(storage.join(run.index, SETTINGS_FILE)):
        names_there = store.read_images(run.index, manifest).paths_sha256
        found = differences({"paths_sha256": names_there}, {"paths_sha256": database.paths_sha256})
    if found:
        raise UserError(
            f"index.path={run.index}: the finished index there is another one: {'; '.join(found)}; "
            "expected an index of this database, or another directory"
        )


def _check_model(run: Run) -> None:
    """Raise `UserError` unless the run's model made a finished index."""
    manifest = store.read_manifest(run.index)
    if manifest is None:
        return
    store.check_model(
        run.index,
        manifest,
        name=run.config.model.name,
        weights_sha256=run.weights.sha256,
        model=run.index_settings()["model"],
    )


def evaluate(configs: Sequence[EvaluateConfig]) -> list[dict[str, Any]]:
    """Run one benchmark or several; prints a table for each and returns the contents of their metrics.json.

    Raises `IncompleteRunError` for the benchmarks in which work failed for good, when all others are done.
    """
    runs = prepare(configs)
    announce(configs[0].model, runs[0].weights)
    for run in runs:
        claim(run.output, run.settings(), "output")
        if store.read_manifest(run.index) is None:
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
                make_index(database, run.index, run.num_shards, source, run.config.describe, settings)
                reports.append(answer(run, source))
            except IncompleteRunError as error:
                say(f"{run.benchmark.name}: incomplete: {error}")
                incomplete.append(f"{run.benchmark.name}: {error}")
    if incomplete:
        raise IncompleteRunError("; ".join(incomplete))
    return reports


def make_index(
    database: Manifest,
    directory: str,
    num_shards: int,
    source: ModelSource,
    config: DescribeConfig,
    settings: dict[str, Any],
) -> None:
    """Describe the database and build its index in a directory claimed with `settings`; what is finished is kept."""
    describe(Description(database, directory, num_shards, source, config), "database", needs_a_readable_photo=True)
    model = {"name": settings["model"]["name"], "weights_sha256": settings["model"]["weights_sha256"]}
    build_index(directory, database, num_shards, model, source.config.descriptor_dim)


def answer(run: Run, source: ModelSource) -> dict[str, Any]:
    """Describe the queries, retrieve, re-rank, and write the predictions, a challenge's submission, metrics.json."""
    config, benchmark = run.config, run.benchmark
    queries = storage.join(run.output, "queries")
    describe(
        Description(benchmark.queries, queries, 1, source, config.describe), "queries", needs_a_readable_photo=False
    )
    num_kept = max(config.rerank.num_candidates, config.index.num_retrieved)
    found = retrieve(run.index, queries, num_kept, config.index, storage.join(run.output, "candidates.parquet"))
    index_about, queries_about = store.read_description(run.index), store.read_description(queries)
    assert index_about is not None
    assert queries_about is not None
    num_readable = index_about["num_images"] - index_about["num_rejected"]
    num_candidates = min(config.rerank.num_candidates, num_readable)
    if num_candidates < config.rerank.num_candidates:
        say(
            f"rerank.num_candidates={config.rerank.num_candidates}: the database has {num_readable} readable photos, "
            "all of them are re-ranked"
        )
    units = work_units(_first_candidates(found, num_candidates), config.rerank.queries_per_unit)
    scored = rerank(units, replace(benchmark, positives=None), source, config, run.output)

    final = answers(len(benchmark.queries), found.query_ids, found.squared_distances, found.ids, scored.by_query)
    write_predictions(storage.join(run.output, "predictions.parquet"), predictions_table(benchmark, final))
    submission = write_submission(run.output, benchmark, final) if benchmark.has_submission else []
    facts = RunFacts(
        weights_sha256=run.weights.sha256,
        untrained=run.weights.untrained,
        num_candidates=num_candidates,
        seconds_describe=queries_about["seconds"],
        seconds_retrieve=found.seconds,
        seconds_rerank=scored.seconds,
        num_rejected_database=index_about["num_rejected"],
        num_rejected_queries=queries_about["num_rejected"],
        report_candidates=config.rerank.report_candidates,
    )
    content = metrics(benchmark, final, config.model, facts)
    storage.write_json(storage.join(run.output, "metrics.json"), content)
    files = ", ".join(["predictions.parquet", *submission, "metrics.json"])
    print(f"\n{summary(content)}\n\n{run.output}: {files}", flush=True)
    return content


def _first_candidates(found: Candidates, num_candidates: int) -> dict[int, list[int]]:
    return {
        int(query_id): row[:num_candidates].tolist() for query_id, row in zip(found.query_ids, found.ids, strict=True)
    }


def build(config: BuildIndexConfig) -> str:
    """Describe and index a folder of photos; returns the index directory."""
    database = folder_manifest(config.database, "database")
    directory = storage.absolute(config.output)
    check_writable(directory, "output")
    num_shards = config.index.num_shards or _default_num_shards(len(database))
    settings = index_settings(database, num_shards, config.model, NOT_LOADED, config.describe)
    check_claim(directory, settings, "output", OF_THE_WEIGHTS)
    weights = load_weights(config.model)
    settings = index_settings(database, num_shards, config.model, weights, config.describe)
    check_claim(directory, settings, "output")
    announce(config.model, weights)
    claim(directory, settings, "output")
    with ray_session(config.cluster):
        source = ModelSource(config.model, ray.put(weights))
        make_index(database, directory, num_shards, source, config.describe, settings)
    return directory


def query(config: QueryConfig) -> dict[str, Any]:
    """Answer a folder of queries from an index that exists; prints a summary, returns metrics.json's content."""
    run = _prepare_query(config)
    announce(config.model, run.weights)
    claim(run.output, run.settings(), "output")
    with ray_session(config.cluster):
        return answer(run, ModelSource(config.model, ray.put(run.weights)))


def _prepare_query(config: QueryConfig) -> Run:
    """Check a run of queries; writes nothing."""
    index = storage.absolute(config.index.path)
    manifest = store.read_manifest(index)
    if manifest is None:
        raise UserError(
            f"index.path={config.index.path}: no finished index there; expected a directory with manifest.json"
        )
    if not storage.exists(manifest.images_root):
        raise UserError(
            f"index.path={config.index.path}: its photos were in {manifest.images_root}, which is not there; "
            "expected them where build_index saw them, re-ranking reads them again"
        )
    run = Run(
        config=_as_evaluation(config, index, len(manifest.shards)),
        benchmark=Benchmark(
            name="query",
            database=store.read_images(index, manifest),
            queries=folder_manifest(config.queries, "queries"),
            positives=None,
            protocol={"positives": "none", "radius_m": None},
        ),
        weights=NOT_LOADED,
        index=index,
        output=storage.absolute(config.output),
    )
    check_writable(run.output, "output")
    check_claim(run.output, run.settings(), "output", OF_THE_WEIGHTS)
    run = replace(run, weights=load_weights(config.model))
    _check_model(run)
    check_claim(run.output, run.settings(), "output")
    return run


def _as_evaluation(config: QueryConfig, index: str, num_shards: int) -> EvaluateConfig:
    return EvaluateConfig(
        output=config.output,
        model=config.model,
        describe=config.describe,
        index=IndexConfig(
            path=index,
            num_shards=num_shards,
            num_retrieved=config.index.num_retrieved,
            num_threads_per_actor=config.index.num_threads_per_actor,
            num_actors=config.index.num_actors,
        ),
        rerank=config.rerank,
        cluster=config.cluster,
    )
