"""`metrics.json`, and the table that a person reads."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pairvpr.config.schema import ModelConfig
from pairvpr.data.manifest import Benchmark
from pairvpr.evaluation.audit import audit, audit_table, audited_candidates
from pairvpr.evaluation.recall import REPORTED_N, recall_at
from pairvpr.retrieval.pipeline import Answer

BYTES_PER_FLOAT = 4
PACKAGES = ("pairvpr", "torch", "ray", "faiss-cpu", "faiss-gpu", "xformers", "numpy", "pyarrow", "pillow")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What a run knows beside its answers. Seconds are work of all actors together, not the wall clock."""

    weights_sha256: str
    untrained: bool
    num_candidates: int
    seconds_describe: float
    seconds_retrieve: float
    seconds_rerank: float
    num_rejected_database: int
    num_rejected_queries: int
    index: dict[str, Any]
    """Its kind and, if it is approximate, its measured recall."""
    report_candidates: Sequence[int] | None = None
    """What `audited_candidates` gets."""


def metrics(benchmark: Benchmark, answers: Sequence[Answer], model: ModelConfig, facts: RunFacts) -> dict[str, Any]:
    """The content of `metrics.json` (docs/formats.md)."""
    num_queries = max(1, len(benchmark.queries))
    return {
        "benchmark": benchmark.name,
        "protocol": benchmark.stamp(),
        "model": {
            "name": model.name,
            "weights_sha256": facts.weights_sha256,
            "untrained": facts.untrained,
            "precision": str(model.precision),
        },
        "index": facts.index,
        **_recalls(benchmark, answers, facts.num_candidates),
        "num_candidates": facts.num_candidates,
        "audit": audit(benchmark, answers, audited_candidates(facts.report_candidates, facts.num_candidates)),
        "seconds_per_query": {
            "describe": facts.seconds_describe / num_queries,
            "retrieve": facts.seconds_retrieve / num_queries,
            "rerank": facts.seconds_rerank / num_queries,
        },
        "kib_per_image": {
            "descriptor": model.descriptor_dim * BYTES_PER_FLOAT / 1024,
            "dense": model.num_patches * model.encoder.embed_dim * BYTES_PER_FLOAT / 1024,
        },
        "rejected_images": {"database": facts.num_rejected_database, "queries": facts.num_rejected_queries},
        "versions": _versions(),
    }


def _recalls(benchmark: Benchmark, answers: Sequence[Answer], num_candidates: int) -> dict[str, Any]:
    """Recall in percent by N as text, over all queries and over those with positives; null without ground truth."""
    if benchmark.positives is None:
        return {"recall": None, "recall_of_queries_with_positives": None, "candidate_ceiling": None}
    positives = benchmark.positives
    retrieved, reranked = [answer.candidates for answer in answers], [answer.reranked for answer in answers]
    longest = max((len(answer.candidates) for answer in answers), default=0)
    global_ns = [n for n in REPORTED_N if n <= longest]
    reranked_ns = [n for n in REPORTED_N if n <= num_candidates]

    def both(*, only_with_positives: bool) -> dict[str, dict[str, float]]:
        return {
            step: {
                str(n): value
                for n, value in recall_at(ranked, positives, ns, only_with_positives=only_with_positives).items()
            }
            for step, ranked, ns in (("global", retrieved, global_ns), ("reranked", reranked, reranked_ns))
        }

    with_positives = any(len(ids) for ids in positives)
    return {
        "recall": both(only_with_positives=False),
        "recall_of_queries_with_positives": both(only_with_positives=True) if with_positives else None,
        "candidate_ceiling": recall_at(retrieved, positives, [num_candidates])[num_candidates],
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def summary(content: dict[str, Any]) -> str:
    """The recall table and what a run cost, from the content of `metrics.json`."""
    protocol, model = content["protocol"], content["model"]
    lines = [
        f"{content['benchmark']}: {protocol['num_queries']:,} queries, {protocol['num_database']:,} database photos, "
        f"model {model['name']} ({model['precision']}, weights {model['weights_sha256'][:12]})"
    ]
    if model["untrained"]:
        lines.append(
            "The network is UNTRAINED (seeded random weights): these numbers show the machinery, nothing else."
        )
    lines += [
        "",
        *(_recall_table(content) if content["recall"] else ["no ground truth: predictions without recall"]),
    ]
    if content["audit"]:
        lines += ["", *audit_table(content["audit"])]
    seconds, kib = content["seconds_per_query"], content["kib_per_image"]
    lines += [
        "",
        f"seconds per query   describe {seconds['describe']:.4f}   retrieve {seconds['retrieve']:.4f}   "
        f"re-rank {seconds['rerank']:.4f}",
        f"KiB per image       descriptor {kib['descriptor']:.1f}   dense features {kib['dense']:.1f}",
    ]
    rejected = content["rejected_images"]
    if any(rejected.values()):
        lines.append(
            f"rejected photos     database {rejected['database']}   queries {rejected['queries']} (unanswered)   "
            "reasons: index/rejected.parquet, queries/rejected.parquet"
        )
    return "\n".join(lines)


def _recall_table(content: dict[str, Any]) -> list[str]:
    recall, num_candidates = content["recall"], content["num_candidates"]
    lines = [f"{'recall@N (%)':<20}" + "".join(f"{n:>8}" for n in recall["global"])]
    for step, label in (("global", "global descriptor"), ("reranked", f"re-ranked, K = {num_candidates}")):
        cells = [recall[step].get(n) for n in recall["global"]]
        lines.append(f"{label:<20}" + "".join(f"{cell:>8.1f}" if cell is not None else f"{'-':>8}" for cell in cells))
    lines.append(
        f"candidate ceiling: {content['candidate_ceiling']:.1f} % of the queries have a positive among their "
        f"{num_candidates} candidates"
    )
    without = content["protocol"]["num_queries_without_positives"]
    if without:
        lines.append(f"{without} queries without a positive count as misses")
    dropped = content["protocol"].get("num_queries_dropped")
    if dropped:
        lines.append(f"{dropped} further queries without a positive are dropped, as the benchmark's rule has it")
    return lines
