"""`pairvpr evaluate benchmark=toy_city output=OUT`: describe, index, retrieve, re-rank, report."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray

from pairvpr.cli import run_job
from pairvpr.config.compose import load_evaluations
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data import storage
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.claim import check_writable, claim
from pairvpr.data.manifest import Benchmark
from pairvpr.distributed.dense import check_sharing
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.runtime import ray_session
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.evaluation.confidence import calibrated
from pairvpr.index import choose
from pairvpr.index.generations import read_manifest
from pairvpr.models.weights import announce, load_weights
from pairvpr.status import published
from pairvpr.terminal import say
from ray_jobs.run import (
    Run,
    as_earlier,
    check_calibration,
    check_claims,
    check_dense_store,
    check_descriptors,
    check_index_model,
    check_photos,
    first_stage,
    given_candidates,
    queries_of_file,
)
from ray_jobs.steps import answer, ensure_index


def main(arguments: Sequence[str]) -> None:
    """One benchmark, or several with `benchmarks=[a,b]`."""
    evaluate(load_evaluations(arguments))


def evaluate(configs: Sequence[EvaluateConfig]) -> list[dict[str, Any]]:
    """Run one benchmark or several; prints a table for each and returns the contents of their metrics.json.

    Raises `IncompleteRunError`, after all others are done, for benchmarks in which work failed for good.
    """
    runs = prepare(configs)
    weights = runs[0].weights and load_weights(configs[0].model, runs[0].weights)
    if runs[0].weights is not None:
        announce(configs[0].model, runs[0].weights)
    for run in runs:
        claim(run.output, run.settings(), "output", as_earlier(run.settings()))
        if run.given is None and read_manifest(run.index) is None:
            claim(run.index, run.index_settings(), "index.path", as_earlier(run.index_settings()))
    reports: list[dict[str, Any]] = []
    incomplete: list[str] = []
    with ray_session(configs[0].cluster):
        for config, run in zip(configs, runs, strict=True):
            prepare_benchmark(config.benchmark, run.output)
        source = weights and ModelSource(configs[0].model, ray.put(weights))
        for config, run in zip(configs, runs, strict=True):
            try:
                with published(run.output, "evaluate"):
                    manifest = None
                    if run.given is None:
                        manifest = ensure_index(
                            run.benchmark.database, run.index, run.num_shards, run.first, source, config
                        )
                    reports.append(answer(run, source, manifest))
            except IncompleteRunError as error:
                say(f"{run.benchmark.name}: incomplete: {error}")
                incomplete.append(f"{run.benchmark.name}: {error}")
    if incomplete:
        raise IncompleteRunError("; ".join(incomplete))
    return reports


def prepare(configs: Sequence[EvaluateConfig]) -> list[Run]:
    """Check all benchmarks of a run; writes nothing. Several benchmarks get separate folders and share the weights."""
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
            raise UserError(f"index.path={index}: the run writes other files there; expected a separate directory")
    if len(configs) > 1 and configs[0].rerank.candidates is not None:
        raise UserError("rerank.candidates: the file is for one benchmark; expected benchmark=..., not several")
    calibration = calibrated(configs[0].rerank)
    benchmarks = _load(configs, outputs)
    first, weights = first_stage(configs[0], configs[0].rerank.num_candidates)
    query_file = queries_of_file(configs[0].describe, first)
    if first.file is not None and query_file is not None:
        for benchmark in benchmarks:
            check_descriptors(first.file, query_file, benchmark)
    runs: list[Run] = []
    for config, benchmark, output, index in zip(configs, benchmarks, outputs, indices, strict=True):
        run = Run(
            config=config,
            benchmark=benchmark,
            weights=weights,
            first=first,
            query_file=query_file,
            index=index,
            num_shards=config.index.num_shards or choose.default_num_shards(len(benchmark.database)),
            output=output,
            calibration=calibration,
            given=given_candidates(config.rerank, benchmark),
        )
        check_calibration(run)
        check_claims(run)
        if run.given is None:
            check_photos(run)
            check_index_model(run)
        check_dense_store(run)
        if any(other.index == index and other.index_settings() != run.index_settings() for other in runs):
            raise UserError(
                f"index.path={index}: these benchmarks have different databases; expected a separate index for each"
            )
        runs.append(run)
    check_sharing([run.store for run in runs if run.store is not None])
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


if __name__ == "__main__":
    sys.exit(run_job("evaluate"))
