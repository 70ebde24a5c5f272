"""The audit: the answers that re-ranking fewer candidates would have given, computed from one run.

A candidate's pair score does not depend on the others. So re-ranking K' of K candidates gives the re-ranked list
without the candidates that retrieval ranked K' (from 0) or later; ties keep retrieval order. Only rounding can differ
from a real run with K' candidates, where pairs share other forward passes. With `rerank.second_direction`, scores do
depend on the other candidates, and only K is audited.

Q queries, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.data.manifest import Benchmark
from pairvpr.evaluation.recall import REPORTED_N, first_hits, recall_of
from pairvpr.retrieval.pipeline import Answer

DEFAULT_CANDIDATES = (10, 20, 50, 100, 200, 500, 1000)
PRINTED_N = (1, 5, 10)


def audited_candidates(report_candidates: Sequence[int] | None, num_candidates: int) -> list[int]:
    """The audited numbers K', ascending: those requested, or else the `DEFAULT_CANDIDATES` below K, and K.

    None exceeds `num_candidates`, the K of the run: a small database has fewer photos than requested.
    """
    wanted = (*DEFAULT_CANDIDATES, num_candidates) if report_candidates is None else report_candidates
    return sorted({min(number, num_candidates) for number in wanted})


def audit(benchmark: Benchmark, answers: Sequence[Answer], numbers: Sequence[int]) -> dict[str, Any] | None:
    """The entry `audit` of `metrics.json` (docs/formats.md) for each K' of `numbers`; None without ground truth."""
    if benchmark.positives is None:
        return None
    retrieved = first_hits([answer.candidates for answer in answers], benchmark.positives)
    reranked = {
        number: first_hits([_reranked(answer, number) for answer in answers], benchmark.positives) for number in numbers
    }
    by_grouping = {
        f"by_{grouping}": {
            name: _entry(retrieved[ids], {number: hits[ids] for number, hits in reranked.items()})
            for name, ids in groups.items()
        }
        for grouping, groups in benchmark.groupings.items()
    }
    return _entry(retrieved, reranked) | {"by_group": None} | by_grouping


def _reranked(answer: Answer, number: int) -> NDArray[np.int64]:
    """The ids that re-ranking the first `number` candidates would give, best first."""
    return answer.reranked[np.isin(answer.reranked, answer.candidates[:number])]


def _entry(retrieved: NDArray[np.float64], reranked: dict[int, NDArray[np.float64]]) -> dict[str, Any]:
    """Counts and shares for some queries, from the positions (Q,) of their first hits in both rankings."""
    right = retrieved < 1
    return {
        "num_queries": len(retrieved),
        "global_recall_at_1": recall_of(retrieved, [1])[1],
        "by_num_candidates": {
            str(number): {
                "reranked": {
                    str(n): value for n, value in recall_of(hits, [n for n in REPORTED_N if n <= number]).items()
                },
                "candidate_ceiling": recall_of(retrieved, [number])[number],
                "corrected": int((~right & (hits < 1)).sum()),
                "broken": int((right & ~(hits < 1)).sum()),
            }
            for number, hits in reranked.items()
        },
    }


def audit_table(content: dict[str, Any]) -> list[str]:
    """The audit as lines for a person: a row for each K', and one for each group at the largest K'."""
    lines = [
        f"{'re-ranking the first':<24}" + "".join(f"{f'recall@{n}':>11}" for n in PRINTED_N) + _heading(),
        *(
            f"{number + ' candidates':<24}"
            + "".join(_cell(row["reranked"].get(str(n))) for n in PRINTED_N)
            + _tail(row)
            for number, row in content["by_num_candidates"].items()
        ),
    ]
    if content["by_group"]:
        lines += ["", *_group_table(content["by_group"], list(content["by_num_candidates"])[-1])]
    return lines


def _group_table(groups: dict[str, Any], largest: str) -> list[str]:
    width = max(24, *(len(name) + 2 for name in groups))
    lines = [f"{f'by group, K = {largest}':<{width}}{'queries':>9}{'global@1':>11}{'recall@1':>11}" + _heading()]
    for name, group in groups.items():
        row = group["by_num_candidates"][largest]
        recalls = _cell(group["global_recall_at_1"]) + _cell(row["reranked"]["1"])
        lines.append(f"{name:<{width}}{group['num_queries']:>9,}{recalls}{_tail(row)}")
    return lines


def _heading() -> str:
    return f"{'ceiling':>10}{'corrected':>11}{'broken':>9}"


def _tail(row: dict[str, Any]) -> str:
    return f"{row['candidate_ceiling']:>10.1f}{row['corrected']:>11,}{row['broken']:>9,}"


def _cell(percent: float | None) -> str:
    return f"{'-':>11}" if percent is None else f"{percent:>11.1f}"
