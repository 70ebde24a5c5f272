"""What stored dense features do to the order of re-ranking: 16 and 8 bits a value against none stored.

    python -m benchmarks.dense_store --report

Run from the root of the checkout; it takes some minutes on two cores. On held-out toy cities, with the committed small
network in fp32, the same candidates are re-ranked with dense features as they are (fp32), as a store in 16 bits gives
them back (half), and as one in 8 bits does (int8). Nothing is written: rounding is all that a store does to a result.

- recall@1, with 95 % percentile bootstraps over the queries;
- Kendall's tau of the pair scores of each query's candidates with those of fp32: 1 = the same order;
- how many queries keep their best answer;
- the largest difference of a pair score, beside the spread (standard deviation) of all pair scores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from torch import Tensor

from benchmarks import shared
from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig, StoredAs
from pairvpr.data import images
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.manifest import Benchmark
from pairvpr.distributed.progress import say
from pairvpr.evaluation.bootstrap import bootstrap_interval
from pairvpr.index.search import Shard, flat_index, search
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from pairvpr.retrieval.dense_store import Layout, as_stored
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.rerank import Reranked, work_units

WHAT = "dense_store"
EXACT = "fp32"
WAYS = (EXACT, *StoredAs)


@dataclass(frozen=True)
class Test:
    """One city and, for each of `WAYS`, the answers to its queries."""

    name: str
    benchmark: Benchmark
    answers: dict[str, list[Reranked]]

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
    """Every way on one city; photos are described and candidates found once."""
    prepare_benchmark(config.benchmark, config.output)
    benchmark = load_benchmark(config.benchmark, config.output)
    describer = Describer(build_model(config.model, load_weights(config.model), torch.device("cpu")))
    database, queries = (
        pipeline.describe(photos, describer, config) for photos in (benchmark.database, benchmark.queries)
    )
    shard, number = Shard(flat_index(database.descriptors), database.ids), config.rerank.num_candidates
    _, found = search(shard, queries.descriptors, number, num_threads=config.index.num_threads_per_actor)
    candidates = {int(query): row.tolist() for query, row in zip(queries.ids, found, strict=True)}
    units = work_units(candidates, config.rerank.queries_per_unit)
    dense = {image_id: describer.embedded(_pixels(benchmark, config, image_id)) for image_id in database.ids.tolist()}
    answers = {}
    for way in WAYS:
        rounded = {image_id: _rounded(features, way) for image_id, features in dense.items()}
        reranker = pipeline.photo_reranker(benchmark, describer, config, rounded.__getitem__)
        scored = [answer for unit in units for answer in reranker.rerank(unit)]
        answers[way] = sorted(scored, key=lambda answer: answer.query_id)
        say(f"{name}: {way} done")
    return Test(name, benchmark, answers)


def _pixels(benchmark: Benchmark, config: EvaluateConfig, image_id: int) -> NDArray[np.uint8]:
    return images.load(benchmark.database.url(image_id), config.model.image_size_px)


def _rounded(features: Tensor, way: str) -> Tensor:
    return features if way == EXACT else as_stored(features, StoredAs(way))


def report(tests: Sequence[Test], config: EvaluateConfig, load_at_start: float) -> str:
    """All tables as Markdown."""
    recalls, orders = [], []
    for name, cities in [*((test.name, [test]) for test in tests), ("all cities", list(tests))]:
        hits = {way: np.concatenate([city.hits(way) for city in cities]) for way in WAYS}
        recalls.append([name, f"{len(hits[EXACT]):,}", *(bootstrap_interval(hits[way]).percent() for way in WAYS)])
        recalls[-1] += [bootstrap_interval(hits[way] - hits[EXACT]).percent() for way in StoredAs]
    spread = float(np.concatenate([scores for test in tests for scores in test.scores(EXACT)]).std())
    for way in StoredAs:
        taus = np.concatenate([test.taus(way) for test in tests])
        same = np.concatenate([test.same_best(way) for test in tests])
        layout = Layout.of_model(config.model, way)
        orders.append(
            [
                str(way),
                f"{layout.record_bytes:,}",
                f"{taus.mean():.4f}",
                f"{np.quantile(taus, 0.01):.4f}",
                f"{taus.min():.4f}",
                f"{100 * (taus == 1).mean():.1f}",
                f"{(~same).sum():,}",
                f"{max(_largest_differences(test, way) for test in tests):.4f}",
            ]
        )
    exact_bytes = 2 * Layout.of_model(config.model, StoredAs.half).record_bytes
    header = (
        "form",
        "bytes a photo",
        "mean tau",
        "1 % of queries below",
        "least",
        "same order, %",
        "other best answer",
    )
    return f"""# What stored dense features do to the order

{config.rerank.num_candidates} candidates of each query, model {config.model.name} ({config.model.precision}), whose
dense features take {exact_bytes:,} bytes a photo as they are.

recall@1 in percent with 95 % bootstrap intervals over the queries, and differences in points, paired by query:

{shared.markdown_table(("test", "queries", *WAYS, *(f"{way} - {EXACT}" for way in StoredAs)), recalls)}

Kendall's tau of each query's candidates with the order of fp32. Pair scores have a standard deviation of {spread:.2f}:

{shared.markdown_table((*header, "largest score difference"), orders)}

{shared.circumstances(WHAT, load_at_start)}"""


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
