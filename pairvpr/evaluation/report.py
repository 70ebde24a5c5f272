"""`metrics.json`, and the printed table."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import DecisionRule, ModelConfig
from pairvpr.data.manifest import Benchmark
from pairvpr.evaluation.audit import audit, audit_table, audited_candidates
from pairvpr.evaluation.confidence import Judge, expected_calibration_error, reliability
from pairvpr.evaluation.position_errors import ERROR_RADII_M, position_errors
from pairvpr.evaluation.predictions import final_order, top_scores
from pairvpr.evaluation.recall import REPORTED_N, first_hits, recall_at, recall_of
from pairvpr.retrieval.pipeline import Answer

BYTES_PER_FLOAT = 4
PACKAGES = ("pairvpr", "torch", "ray", "faiss-cpu", "faiss-gpu", "numpy", "pyarrow", "pillow")


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts about a run besides its answers. Seconds are the summed work of all actors, not wall-clock time."""

    weights_sha256: str | None
    """None where no network ran."""
    untrained: bool
    num_candidates: int
    seconds_describe: float
    seconds_retrieve: float
    seconds_rerank: float
    num_rejected_database: int
    num_rejected_queries: int
    index: dict[str, Any] | None
    """The index's kind and, if approximate, its measured recall; None if candidates were given."""
    report_candidates: Sequence[int] | None = None
    second_direction: int | None = None
    """The numbers of candidates for `audited_candidates`."""
    judge: Judge | None = None
    """Computes the confidence of answers."""
    num_remarked: dict[str, int] = field(default_factory=dict)
    """Photos that were read although their files are odd, under `database` and `queries`."""
    unscored: dict[str, str] = field(default_factory=dict)
    """Path and reason of each candidate that could not be scored."""
    attention: str | None = None
    """What ran the pair decoder's attention."""
    decision: DecisionRule = DecisionRule.pair
    """The rule that orders its answers."""
    first_stage: dict[str, Any] | None = None
    """`name` and `descriptor_dim` of the first stage, where it is not the network's own."""
    dense_store: dict[str, Any] | None = None
    """The store of dense features that it re-ranked from, with its `kib_per_image`."""


def metrics(benchmark: Benchmark, answers: Sequence[Answer], model: ModelConfig, facts: RunFacts) -> dict[str, Any]:
    """The content of `metrics.json` (docs/formats.md)."""
    num_queries = max(1, len(benchmark.queries))
    return {
        "benchmark": benchmark.name,
        "protocol": benchmark.stamp(),
        "model": _model_entry(model, facts),
        **({} if facts.first_stage is None else {"first_stage": facts.first_stage}),
        "index": facts.index,
        **_recalls(benchmark, answers, facts.num_candidates),
        **({} if facts.decision is DecisionRule.pair else {"decision": decision_entry(benchmark, answers, facts)}),
        "num_candidates": facts.num_candidates,
        "scored_per_query": _scored_per_query(answers),
        "confidence": None if facts.judge is None else _confidence(benchmark, answers, facts.judge),
        "second_direction": facts.second_direction,
        "audit": audit(benchmark, answers, _audited(facts)) if facts.num_candidates else None,
        "seconds_per_query": {
            "describe": facts.seconds_describe / num_queries,
            "retrieve": facts.seconds_retrieve / num_queries,
            "rerank": facts.seconds_rerank / num_queries,
        },
        "kib_per_image": {
            "descriptor": (facts.first_stage or {}).get("descriptor_dim", model.descriptor_dim)
            * BYTES_PER_FLOAT
            / 1024,
            "dense": model.num_patches * model.decoder.embed_dim * BYTES_PER_FLOAT / 1024
            if facts.dense_store is None
            else facts.dense_store["kib_per_image"],
        },
        "dense_store": facts.dense_store,
        "rejected_images": {"database": facts.num_rejected_database, "queries": facts.num_rejected_queries},
        "remarked_images": facts.num_remarked,
        "unscored_candidates": facts.unscored,
        "versions": _versions(),
    }


def _model_entry(model: ModelConfig, facts: RunFacts) -> dict[str, Any]:
    """The network; where none ran, the first stage, which has no weights."""
    if facts.weights_sha256 is None:
        assert facts.first_stage is not None
        return {"name": facts.first_stage["name"], "weights_sha256": "", "untrained": False, "precision": None}
    return {
        "name": model.name,
        "weights_sha256": facts.weights_sha256,
        "untrained": facts.untrained,
        "precision": str(model.precision),
        **({"scaled_decoding": True} if model.scaled_decoding else {}),
        **({"compile": True} if model.compile else {}),
        **({} if facts.attention is None else {"attention": facts.attention}),
    }


def _audited(facts: RunFacts) -> list[int]:
    if facts.second_direction is not None:
        return [facts.num_candidates]
    return audited_candidates(facts.report_candidates, facts.num_candidates)


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
        "candidate_ceiling": recall_at(retrieved, positives, [num_candidates])[num_candidates]
        if num_candidates
        else None,
    }


def decision_entry(benchmark: Benchmark, answers: Sequence[Answer], facts: RunFacts) -> dict[str, Any]:
    """The entry `decision` (docs/formats.md): recall in the decision's order next to the published one."""
    final = [final_order(answer) for answer in answers]
    content: dict[str, Any] = {"rule": str(facts.decision), "recall": None, "corrected": None, "broken": None}
    if benchmark.positives is not None:
        before, after = (
            first_hits(ranked, benchmark.positives) for ranked in ([answer.reranked for answer in answers], final)
        )
        recall = recall_of(after, [n for n in REPORTED_N if n <= facts.num_candidates])
        content |= {
            "recall": {str(n): value for n, value in recall.items()},
            "corrected": int(((after < 1) & ~(before < 1)).sum()),
            "broken": int(((before < 1) & ~(after < 1)).sum()),
            "recall_at_1": {
                f"by_{grouping}": {name: _percent(after[ids] < 1) for name, ids in groups.items()}
                for grouping, groups in benchmark.groupings.items()
            },
        }
    utm_m, queries_m = benchmark.database.utm_m, benchmark.queries.utm_m
    estimates_m = [answer.decided.position_m if answer.decided else (math.nan, math.nan) for answer in answers]
    content["error_m"] = {
        "global": position_errors(_best_m([answer.candidates for answer in answers], utm_m), queries_m),
        "reranked": position_errors(_best_m([answer.reranked for answer in answers], utm_m), queries_m),
        "decided": position_errors(_best_m(final, utm_m), queries_m),
        "estimated": position_errors(np.array(estimates_m).reshape(-1, 2), queries_m),
    }
    return content


def _best_m(ranked: Sequence[NDArray[np.int64]], utm_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """(Q, 2) position in metres of each query's best answer; NaN if there is none, or its position is unknown."""
    nowhere = np.full(2, np.nan)
    return np.array([utm_m[ids[0]] if len(ids) else nowhere for ids in ranked]).reshape(-1, 2)


def _scored_per_query(answers: Sequence[Answer]) -> float | None:
    """Mean number of candidates scored per answered query; None if all of them were scored."""
    scored = [np.isfinite(answer.pair_scores) for answer in answers if len(answer.pair_scores)]
    if all(its.all() for its in scored):
        return None
    return float(np.mean([its.sum() for its in scored]))


def _confidence(benchmark: Benchmark, answers: Sequence[Answer], judge: Judge) -> dict[str, Any]:
    """The entry `confidence` (docs/formats.md); what needs ground truth is null without it."""
    confidence = judge.confidence(top_scores(answers))
    answered, in_map = ~np.isnan(confidence), judge.in_map(confidence)
    content: dict[str, Any] = {
        "temperature": judge.temperature,
        "midpoint": judge.midpoint,
        "not_in_map_below": judge.not_in_map_below,
        "num_answered": int(answered.sum()),
        "num_in_map": None if in_map is None else int(in_map.sum()),
        "expected_calibration_error": None,
        "reliability": None,
        "recall_at_1_of_in_map": None,
        "refused_without_positives": None,
        "refused_with_positives": None,
    }
    if benchmark.positives is None:
        return content
    is_right = first_hits([final_order(answer) for answer in answers], benchmark.positives) < 1
    bins = reliability(confidence[answered].astype(np.float64), is_right[answered])
    content |= {
        "expected_calibration_error": expected_calibration_error(bins),
        "reliability": [asdict(row) for row in bins],
    }
    if in_map is not None:
        has_positives = np.array([len(ids) > 0 for ids in benchmark.positives], np.bool_)
        content |= {
            "recall_at_1_of_in_map": _percent(is_right[in_map]),
            "refused_without_positives": _percent(~in_map[answered & ~has_positives]),
            "refused_with_positives": _percent(~in_map[answered & has_positives]),
        }
    return content


def _percent(flags: NDArray[np.bool_]) -> float | None:
    """None of nothing."""
    return 100 * float(flags.mean()) if len(flags) else None


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
    network = "no network"
    if model["weights_sha256"]:
        network = f"model {model['name']} ({model['precision']}, weights {model['weights_sha256'][:12]})"
    lines = [
        f"{content['benchmark']}: {protocol['num_queries']:,} queries, {protocol['num_database']:,} database photos, "
        f"{network}"
    ]
    if content.get("first_stage"):
        about = content["first_stage"]
        lines.append(f"first stage: {about['name']}, {about['descriptor_dim']:,} values a photo")
    if model["untrained"]:
        lines.append(
            "The network is UNTRAINED (seeded random weights): these numbers show the machinery, nothing else."
        )
    lines += [
        "",
        *(_recall_table(content) if content["recall"] else ["no ground truth: predictions without recall"]),
    ]
    if content.get("decision"):
        lines += ["", *_decision_lines(content["decision"])]
    if content["audit"]:
        lines += ["", *audit_table(content["audit"])]
    if content["confidence"]:
        lines += ["", *_confidence_lines(content["confidence"])]
    if content["scored_per_query"] is not None:
        lines += ["", f"candidates scored   {content['scored_per_query']:.1f} a query"]
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
    remarked = content["remarked_images"]
    if any(remarked.values()):
        lines.append(
            f"photos with a remark  database {remarked['database']}   queries {remarked['queries']} (they were read)   "
            "remarks: index/remarks.parquet, queries/remarks.parquet"
        )
    unscored = content["unscored_candidates"]
    if unscored:
        path, reason = next(iter(unscored.items()))
        more = f" and {len(unscored) - 1} more (metrics.json)" if len(unscored) > 1 else ""
        lines.append(
            f"unscored candidates {len(unscored)}: {path}{more}: {reason}; they keep the order of retrieval behind the "
            "others. Put them back, or take them out of the index (update_index remove=), and query into a new output"
        )
    return "\n".join(lines)


def _confidence_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    if found["expected_calibration_error"] is not None:
        lines.append(
            f"confidence          expected calibration error {found['expected_calibration_error']:.3f} at temperature "
            f"{found['temperature']:.3f}, midpoint {found['midpoint']:.3f}"
        )
    if found["num_in_map"] is not None:
        shares = [
            f"{what} {found[key]:.1f} %"
            for key, what in (
                ("recall_at_1_of_in_map", "of them right"),
                ("refused_without_positives", "refused of queries without a positive"),
                ("refused_with_positives", "of those with one"),
            )
            if found[key] is not None
        ]
        lines.append(
            ", ".join(
                [f"in this map         {found['num_in_map']:,} of {found['num_answered']:,} queries answered", *shares]
            )
        )
    return lines


def _decision_lines(found: dict[str, Any]) -> list[str]:
    """The decision's changes, and the distances of answers from the truth, as text."""
    lines = []
    if found["corrected"] is not None:
        lines.append(f"{found['rule']} decision: {found['corrected']} queries corrected, {found['broken']} broken")
    errors = {name: its for name, its in found["error_m"].items() if its is not None}
    if not errors:
        return lines
    lines.append(f"{'error':<20}{'median, m':>10}" + "".join(f"{f'<= {radius} m (%)':>14}" for radius in ERROR_RADII_M))
    for name, its in errors.items():
        median = "-" if its["median_m"] is None else f"{its['median_m']:.1f}"
        shares = "".join(f"{its[f'within_{radius}_m']:>14.1f}" for radius in ERROR_RADII_M)
        lines.append(f"{name:<20}{median:>10}{shares}")
    return lines


def _recall_row(label: str, cells: Sequence[float | None]) -> str:
    return f"{label:<20}" + "".join(f"{cell:>8.1f}" if cell is not None else f"{'-':>8}" for cell in cells)


def _recall_table(content: dict[str, Any]) -> list[str]:
    recall, num_candidates = content["recall"], content["num_candidates"]
    lines = [f"{'recall@N (%)':<20}" + "".join(f"{n:>8}" for n in recall["global"])]
    steps = [("global", "global descriptor"), ("reranked", f"re-ranked, K = {num_candidates}")]
    for step, label in steps if num_candidates else steps[:1]:
        cells = [recall[step].get(n) for n in recall["global"]]
        lines.append(_recall_row(label, cells))
    if content.get("decision"):
        decided = content["decision"]
        cells = [decided["recall"].get(n) for n in recall["global"]]
        lines.append(_recall_row(f"decided, {decided['rule']}", cells))
    if num_candidates:
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
