"""What roundings and short cuts do to the order of re-ranking: recall, order, seconds beside fp32 in full.

    python -m benchmarks.rerank_order --report

Run from the root of the checkout; it takes some minutes on two cores. On held-out toy cities, with the committed small
network, the same candidates (those of fp32) are re-ranked

- in fp32, both directions of all pairs;
- from a store of dense features in 16 bits a value (half), or 8 (int8);
- with the network in bf16, or fp16, dense features included; in bf16 also with the attention that only larger photos
  than this network's get (`attention.MANY_WEIGHTS`), where the machine has it;
- with the second direction of the best 2, or 5, alone.

Measured are recall@1, with 95 % percentile bootstraps over the queries; Kendall's tau of the pair scores of each
query's candidates with those of fp32 (1 = the same order); how many queries keep their best answer; the largest
difference of a pair score, beside the spread (standard deviation) of all pair scores; and the seconds that re-ranking
all cities took, dense features at hand.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

from benchmarks import shared
from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig, Precision, StoredAs
from pairvpr.data import images
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.manifest import Benchmark
from pairvpr.distributed.progress import say
from pairvpr.evaluation.bootstrap import bootstrap_interval
from pairvpr.index.search import Shard, flat_index, search
from pairvpr.models import attention
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.dense_store import as_stored
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.rerank import Reranked, WorkUnit, work_units

WHAT = "rerank_order"


@dataclass(frozen=True)
class Way:
    """How pairs are scored."""

    precision: Precision = Precision.fp32
    stored_as: StoredAs | None = None
    second_direction: int | None = None
    smallest_products: int = attention.MANY_WEIGHTS


EXACT = "fp32"
WAYS = {
    EXACT: Way(),
    "half": Way(stored_as=StoredAs.half),
    "int8": Way(stored_as=StoredAs.int8),
    "bf16": Way(precision=Precision.bf16),
    "bf16, products": Way(precision=Precision.bf16, smallest_products=0),
    "fp16": Way(precision=Precision.fp16),
    "second 2": Way(second_direction=2),
    "second 5": Way(second_direction=5),
}
OTHERS = [name for name in WAYS if name != EXACT]


@dataclass(frozen=True)
class Test:
    """One city and, for each of `WAYS`, the answers to its queries, and seconds."""

    name: str
    benchmark: Benchmark
    answers: dict[str, list[Reranked]]
    seconds: dict[str, float]

    def hits(self, way: str) -> NDArray[np.float64]:
        """(Q,) whether the best answer is right."""
        assert self.benchmark.positives is not None
        return np.array(
            [answer.ids[0] in self.benchmark.positives[answer.query_id] for answer in self.answers[way]], float
        )

    def scores(self, way: str) -> list[NDArray[np.float32]]:
        """For each query, the pair scores (K,) in the order of the candidates' ids."""
        return [answer.pair_scores[np.argsort(answer.ids)] for answer in self.answers[way]]

    def taus(self, way: str) -> NDArray[np.float64]:
        """(Q,) Kendall's tau with fp32."""
        pairs = zip(self.scores(EXACT), self.scores(way), strict=True)
        return np.array([kendalltau(exact, stored)[0] for exact, stored in pairs])

    def same_best(self, way: str) -> NDArray[np.bool_]:
        """(Q,) whether the best answer is that of fp32."""
        return np.array([a.ids[0] == b.ids[0] for a, b in zip(self.answers[EXACT], self.answers[way], strict=True)])


def run(config: EvaluateConfig, name: str) -> Test:
    """Every way on one city; candidates are found once, in fp32."""
    prepare_benchmark(config.benchmark, config.output)
    benchmark = load_benchmark(config.benchmark, config.output)
    units = candidate_units(benchmark, config)
    answers: dict[str, list[Reranked]] = {}
    seconds: dict[str, float] = {}
    for title, way in WAYS.items():
        model = replace(config.model, precision=way.precision)
        settings = replace(config, model=model, rerank=replace(config.rerank, second_direction=way.second_direction))
        describer = Describer(build_model(model, load_weights(model), torch.device("cpu")))
        with patch.object(attention, "MANY_WEIGHTS", way.smallest_products):
            dense = dense_features(benchmark, units, describer, settings, way.stored_as)
            reranker = pipeline.photo_reranker(benchmark, describer, settings.rerank, dense.__getitem__)
            start_s = time.perf_counter()
            scored = [answer for unit in units for answer in reranker.rerank(unit)]
            seconds[title] = time.perf_counter() - start_s
        answers[title] = sorted(scored, key=lambda answer: answer.query_id)
        say(f"{name}: {title} done in {seconds[title]:.1f} s")
    return Test(name, benchmark, answers, seconds)


def candidate_units(benchmark: Benchmark, config: EvaluateConfig) -> list[WorkUnit]:
    """The candidates that re-ranking gets, by the network in fp32."""
    describer = Describer(build_model(config.model, load_weights(config.model), torch.device("cpu")))
    database, queries = (
        pipeline.describe(photos, describer, config.describe) for photos in (benchmark.database, benchmark.queries)
    )
    shard, number = Shard(flat_index(database.descriptors), database.ids), config.rerank.num_candidates
    _, found = search(shard, queries.descriptors, number, num_threads=config.index.num_threads_per_actor)
    candidates = {int(query): row.tolist() for query, row in zip(queries.ids, found, strict=True)}
    return work_units(candidates, config.rerank.queries_per_unit)


def dense_features(
    benchmark: Benchmark,
    units: Sequence[WorkUnit],
    describer: Describer,
    config: EvaluateConfig,
    stored_as: StoredAs | None,
) -> dict[int, Tensor]:
    """What the decoder reads of all candidates, as a store would give it back, if there is one."""
    image_ids = {image_id for unit in units for ids in unit.candidates.values() for image_id in ids}
    found = {}
    for image_id in sorted(image_ids):
        features = describer.embedded(images.load(benchmark.database.url(image_id), config.model.image_size_px))
        found[image_id] = features if stored_as is None else as_stored(features, stored_as)
    return found


def report(tests: Sequence[Test], config: EvaluateConfig, load_at_start: float) -> str:
    """All tables as Markdown."""
    spread = float(np.concatenate([scores for test in tests for scores in test.scores(EXACT)]).std())
    recall_header = ("", "recall@1, %", "less fp32", *(test.name for test in tests), "seconds", "times as fast")
    order_header = (
        *("", "mean tau", "1 % of queries below", "least", "same order, %"),
        *("other best answer", "largest score difference"),
    )
    return f"""# What roundings and short cuts do to the order of re-ranking

{sum(len(test.answers[EXACT]) for test in tests):,} queries, {config.rerank.num_candidates} candidates of each, model
{config.model.name}. half, int8: dense features from a store. bf16, fp16: the whole network; products:
with the attention of larger photos. second N: both directions for the best N of the first alone.

recall@1 in percent with 95 % bootstrap intervals over the queries, and differences in points, paired by query:

{shared.markdown_table(recall_header, [recall_row(tests, way) for way in WAYS])}

Kendall's tau of each query's candidates with the order of fp32. Pair scores have a standard deviation of {spread:.2f};
a candidate whose second direction is not scored has twice the first.

{shared.markdown_table(order_header, [order_row(tests, way) for way in OTHERS])}

{shared.circumstances(WHAT, load_at_start)}"""


def recall_row(tests: Sequence[Test], way: str) -> list[str]:
    """recall@1 of all cities, the difference to fp32, each city's; seconds."""
    hits, exact = (np.concatenate([test.hits(name) for test in tests]) for name in (way, EXACT))
    seconds, exact_seconds = (sum(test.seconds[name] for test in tests) for name in (way, EXACT))
    return [
        way,
        bootstrap_interval(hits).percent(),
        bootstrap_interval(hits - exact).percent(),
        *(f"{100 * test.hits(way).mean():.1f}" for test in tests),
        f"{seconds:.1f}",
        f"{exact_seconds / seconds:.2f}",
    ]


def order_row(tests: Sequence[Test], way: str) -> list[str]:
    """How far the order is from that of fp32."""
    taus = np.concatenate([test.taus(way) for test in tests])
    same = np.concatenate([test.same_best(way) for test in tests])
    return [
        way,
        f"{taus.mean():.4f}",
        f"{np.quantile(taus, 0.01):.4f}",
        f"{taus.min():.4f}",
        f"{100 * (taus == 1).mean():.1f}",
        f"{(~same).sum():,}",
        f"{max(_largest_differences(test, way) for test in tests):.4f}",
    ]


def _largest_differences(test: Test, way: str) -> float:
    pairs = zip(test.scores(EXACT), test.scores(way), strict=True)
    return max(float(np.abs(exact - stored).max()) for exact, stored in pairs)


def main() -> None:
    """Every city, all cities together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="cities (1 2 3)")
    parser.add_argument("--places", type=int, default=350, help="places, and queries, of each city (350)")
    parser.add_argument("--candidates", type=int, default=20, help="candidates re-ranked (20)")
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    more = [f"benchmark.num_places={options.places}", f"rerank.num_candidates={options.candidates}"]
    with tempfile.TemporaryDirectory() as folder:
        configs = [
            load(EvaluateConfig, [f"output={folder}/{seed}", "benchmark=toy_city", f"benchmark.seed={seed}", *more])
            for seed in options.seeds
        ]
        tests = [run(config, f"city {seed}") for config, seed in zip(configs, options.seeds, strict=True)]
    shared.publish(WHAT, report(tests, configs[0], load_at_start), options.report)


if __name__ == "__main__":
    main()
