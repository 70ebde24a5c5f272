"""`pairvpr search_checkpoints checkpoints=DIR benchmark=toy_city output=OUT`: which epoch is the best?

Every checkpoint of a training run is evaluated in two stages by the single-machine pipeline, each on its own actor;
as many run at once as the cluster has room for.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import ray

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import DescribeBothConfig, EvaluateConfig, IndexConfig
from pairvpr.config.train_schema import SearchCheckpointsConfig
from pairvpr.data import sealed, storage
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.claim import check_claim, check_writable, claim
from pairvpr.data.manifest import Benchmark
from pairvpr.distributed.network import own_device
from pairvpr.distributed.pool import PoolActor, SupervisedPool
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import plan_actors, ray_session
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.evaluation.recall import recall_at
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.rerank import SCORING
from pairvpr.secrets import without_secrets
from pairvpr.status import published

SUFFIXES = (".pt", ".pth", ".safetensors")
ROLLING = "last.pt"
SEARCHED_N = (1, 5, 10)
COLUMNS = [f"{step}_recall@{n}" for step in ("global", "reranked") for n in SEARCHED_N]
NOT_KNOWN = "-"


@dataclass(frozen=True)
class Search:
    """One search, checked and ready."""

    config: SearchCheckpointsConfig
    output: str
    benchmark: Benchmark
    urls: dict[str, str]
    """The checkpoints by name."""

    def settings(self) -> dict[str, Any]:
        """The settings that decide the numbers, as plain values."""
        config = self.config
        return {
            "benchmark": {"name": self.benchmark.name} | self.benchmark.stamp(),
            "model": config.model.settings(),
            "describe_batch_size": config.describe.batch_size,
            "num_candidates": config.rerank.num_candidates,
            "rerank_batch_size": config.rerank.batch_size,
            "rerank_queries_per_unit": config.rerank.queries_per_unit,
            "rerank_second_direction": config.rerank.second_direction,
            "scoring": SCORING,
        }


def main(arguments: Sequence[str]) -> None:
    """All checkpoints of one folder on one benchmark."""
    search_checkpoints(load(SearchCheckpointsConfig, arguments))


def search_checkpoints(config: SearchCheckpointsConfig) -> pa.Table:
    """Evaluate all checkpoints; writes `checkpoints.csv` and `.parquet`, prints the table and returns it.

    Raises `IncompleteRunError`, after everything else, if checkpoints failed; the table holds their errors.
    """
    search = _prepare(config)
    with ray_session(config.cluster):
        claim(search.output, search.settings(), "output")
        prepare_benchmark(config.benchmark, search.output)
        with published(search.output, "search_checkpoints"):
            failed = _evaluate(search)
    table = _table(search, failed)
    _publish(search.output, table)
    print(without_secrets(_text(table)))
    if failed:
        raise IncompleteRunError(
            f"{len(failed)} of {len(search.urls)} checkpoints failed: {', '.join(failed)}; their errors are in "
            f"{storage.join(search.output, 'checkpoints.csv')}; run the same command again to retry only these"
        )
    return table


def _prepare(config: SearchCheckpointsConfig) -> Search:
    folder, output = storage.absolute(config.checkpoints), storage.absolute(config.output)
    check_writable(output, "output")
    names = [name for name in storage.list_files(folder) if name.endswith(SUFFIXES)]
    kept = [
        name for name in names if name != ROLLING
    ] or names  # a finished run also keeps its last one under its own name
    if not kept:
        raise UserError(f"checkpoints={config.checkpoints}: no checkpoint found; expected {', '.join(SUFFIXES)} files")
    search = Search(
        config=config,
        output=output,
        benchmark=load_benchmark(config.benchmark, output),
        urls={name: storage.join(folder, name) for name in kept},
    )
    if search.benchmark.positives is None:
        raise UserError(
            f"benchmark={search.benchmark.name}: it has no ground truth; expected a benchmark with positives"
        )
    check_claim(output, search.settings(), "output")
    return search


def _evaluate(search: Search) -> dict[str, str]:
    """The errors of checkpoints that failed, by name."""
    config, names = search.config, list(search.urls)
    plan = plan_actors(config.rerank)
    evaluation = EvaluateConfig(
        output=search.output,
        benchmark=config.benchmark,
        model=config.model,
        describe=DescribeBothConfig(**asdict(config.describe)),
        index=IndexConfig(num_retrieved=max(SEARCHED_N), num_threads_per_actor=config.describe.num_threads_per_actor),
        rerank=config.rerank,
    )
    args = (ray.put(search.benchmark), evaluation)
    make_actor = ray.remote(_SearchActor).options(
        num_cpus=plan.cpus_per_actor, num_gpus=plan.gpus_per_actor, scheduling_strategy="SPREAD"
    )
    units = {number: (search.urls[name], _result_url(search.output, name)) for number, name in enumerate(names)}
    with (
        Progress("search", len(names), "checkpoints") as progress,
        SupervisedPool(lambda: make_actor.remote(*args), min(plan.num_actors, len(names)), "search") as pool,
    ):
        failed = pool.run(units, lambda *_: progress.add(1))
    return {names[number]: error for number, error in sorted(failed.items())}


class _SearchActor(PoolActor):
    """Evaluates checkpoints, and publishes each result before reporting it done."""

    def __init__(self, benchmark: Benchmark, config: EvaluateConfig) -> None:
        self.benchmark, self.config = benchmark, config
        self.device = own_device()

    def run(self, unit: tuple[str, str]) -> None:
        url, result_url = unit
        weights = load_weights(replace(self.config.model, weights=url))
        if _read_result(result_url).get("weights_sha256") == weights.sha256:
            return
        model = build_model(self.config.model, weights, self.device)
        answers = pipeline.run(self.benchmark, model, self.config)
        assert self.benchmark.positives is not None
        result: dict[str, Any] = {"weights_sha256": weights.sha256}
        for step, ranked in (
            ("global", [answer.candidates for answer in answers]),
            ("reranked", [answer.reranked for answer in answers]),
        ):
            recalls = recall_at(ranked, self.benchmark.positives, SEARCHED_N)
            result |= {f"{step}_recall@{n}": value for n, value in recalls.items()}
        sealed.write_json(result_url, result)


def _result_url(output: str, name: str) -> str:
    return storage.join(output, "results", f"{name}.json")


def _read_result(url: str) -> dict[str, Any]:
    """A checkpoint's result; empty if there is none or (with a warning) it is damaged."""
    try:
        return sealed.read_json(url, "its checkpoint is evaluated again") or {}
    except sealed.DamagedFileError as error:
        sealed.warn(error)
        return {}


def _table(search: Search, failed: dict[str, str]) -> pa.Table:
    """A row for each checkpoint, by name; recalls are null if it failed, and re-ranked ones of more than K answers."""
    most = search.config.rerank.num_candidates
    known = [name for name in COLUMNS if name.startswith("global") or int(name.partition("@")[2]) <= most]
    rows = []
    for name in search.urls:
        result = {} if name in failed else _read_result(_result_url(search.output, name))
        rows.append(
            {"checkpoint": name}
            | {column: result.get(column) if column in known else None for column in COLUMNS}
            | {"weights_sha256": result.get("weights_sha256"), "error": failed.get(name)}
        )
    schema = pa.schema(
        [("checkpoint", pa.string())]
        + [(column, pa.float64()) for column in COLUMNS]
        + [("weights_sha256", pa.string()), ("error", pa.string())]
    )
    return pa.Table.from_pylist(rows, schema=schema)


def _publish(output: str, table: pa.Table) -> None:
    parquet, text = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    pyarrow.csv.write_csv(table, text)
    storage.write_bytes(storage.join(output, "checkpoints.parquet"), parquet.getvalue())
    storage.write_bytes(storage.join(output, "checkpoints.csv"), text.getvalue())


def _text(table: pa.Table) -> str:
    """The printed table, and the best checkpoint, by re-ranked (where pairs are scored) and then by global recall@1."""
    rows = table.to_pylist()
    width = max(len(row["checkpoint"]) for row in rows)
    lines = [f"{'recall@N (%)':<{width}}  " + "".join(f"{column.replace('_recall', ' '):>14}" for column in COLUMNS)]
    for row in rows:
        cells = row["error"] or "".join(f"{_percent(row[column]):>14}" for column in COLUMNS)
        lines.append(f"{row['checkpoint']:<{width}}  {cells}")
    best = max(rows, key=_rank)
    if best["error"] is None:
        step, recall = "re-ranked", best["reranked_recall@1"]
        if recall is None:
            step, recall = "global, nothing re-ranked", best["global_recall@1"]
        lines.append(f"best: {best['checkpoint']}, recall@1 {_percent(recall)} {step}")
    return "\n".join(lines)


def _percent(recall: float | None) -> str:
    return NOT_KNOWN if recall is None else f"{recall:.1f}"


def _rank(row: dict[str, Any]) -> tuple[float, float]:
    if row["error"] is not None:
        return -math.inf, -math.inf
    reranked = row["reranked_recall@1"]
    return 0.0 if reranked is None else reranked, row["global_recall@1"]


if __name__ == "__main__":
    sys.exit(run_job("search_checkpoints"))
