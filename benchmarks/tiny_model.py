"""What the committed small model has learnt: recall on cities and photos that its training never saw.

    python -m benchmarks.tiny_model --report

Run it by hand from the root of the checkout; it takes some twenty minutes on two cores. On held-out toy cities (seeds
below those of the training sets) and, where they are at hand, on real photos of a corridor (`--corridor DIR` with
`database/`, `queries/`, `ground_truth.csv`), recall@1 of:

- thumbnails: photos shrunk to 16 x 16 grey pixels, mean 0, length 1; a plain baseline;
- untrained: the network's global descriptor with seeded random weights;
- global: the same after training;
- re-ranked: its first candidates sorted by the pair classifier.

Intervals are 95 % percentile bootstraps over the queries; those of differences resample both ways together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks import shared
from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.distributed.progress import say
from pairvpr.evaluation.bootstrap import bootstrap_interval
from pairvpr.index.search import Shard, flat_index, search
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline

WHAT = "tiny_model"
THUMBNAIL_PX = 16
WAYS = ("thumbnails", "untrained", "global", "re-ranked")
DIFFERENCES = (("global", "untrained"), ("re-ranked", "global"), ("global", "thumbnails"))


@dataclass(frozen=True)
class Test:
    """One benchmark and, for each of `WAYS`, whether the first answer to each query was right (Q,) bool."""

    name: str
    num_database: int
    hits: dict[str, NDArray[np.bool_]]

    @property
    def num_queries(self) -> int:
        """Q."""
        return len(next(iter(self.hits.values())))


def run(config: EvaluateConfig, name: str) -> Test:
    """All ways on one benchmark."""
    prepare_benchmark(config.benchmark, config.output)
    benchmark = load_benchmark(config.benchmark, config.output)
    trained = _answers(config, benchmark)
    untrained = replace(config, model=replace(config.model, weights=None), rerank=replace(config.rerank))
    untrained.rerank.num_candidates = 1
    hits = {
        "thumbnails": _hits(benchmark, thumbnail_answers(benchmark)),
        "untrained": _hits(benchmark, [answer.candidates for answer in _answers(untrained, benchmark)]),
        "global": _hits(benchmark, [answer.candidates for answer in trained]),
        "re-ranked": _hits(benchmark, [answer.reranked for answer in trained]),
    }
    say(f"{name}: " + ", ".join(f"{way} {100 * found.mean():.1f}" for way, found in hits.items()))
    return Test(name, len(benchmark.database), hits)


def _answers(config: EvaluateConfig, benchmark: Benchmark) -> list[pipeline.Answer]:
    model = build_model(config.model, load_weights(config.model), torch.device("cpu"))
    return pipeline.run(benchmark, model, config)


def _hits(benchmark: Benchmark, ranked: Sequence[NDArray[np.int64]]) -> NDArray[np.bool_]:
    assert benchmark.positives is not None
    return np.array([answer[0] in positives for answer, positives in zip(ranked, benchmark.positives, strict=True)])


def thumbnail_answers(benchmark: Benchmark) -> list[NDArray[np.int64]]:
    """The nearest database thumbnail of each query, as a list of one id each."""
    database, queries = _thumbnails(benchmark.database), _thumbnails(benchmark.queries)
    shard = Shard(flat_index(database), np.arange(len(database)))
    return list(search(shard, queries, 1, num_threads=2)[1])


def _thumbnails(photos: Manifest) -> NDArray[np.float32]:
    rows = []
    for image_id in range(len(photos)):
        with Image.open(photos.url(image_id)) as image:
            grey = image.convert("L").resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BILINEAR)
        row = np.asarray(grey, np.float32).ravel()
        rows.append((row - row.mean()) / max(float(np.linalg.norm(row - row.mean())), 1e-6))
    return np.stack(rows)


def report(tests: Sequence[Test], num_candidates: int, load_at_start: float) -> str:
    """All tables as Markdown."""
    rows = [
        [test.name, f"{test.num_queries:,}", f"{test.num_database:,}"]
        + [bootstrap_interval(test.hits[way].astype(np.float64)).percent() for way in WAYS]
        for test in tests
    ]
    differences = [
        [test.name]
        + [
            bootstrap_interval(test.hits[way].astype(np.float64) - test.hits[other].astype(np.float64)).percent()
            for way, other in DIFFERENCES
        ]
        for test in tests
    ]
    return f"""# What the small model has learnt

recall@1 in percent with 95 % bootstrap intervals over the queries; {num_candidates} candidates are re-ranked.

{shared.markdown_table(("test", "queries", "database", *WAYS), rows)}

Differences in points, paired by query:

{shared.markdown_table(("test", *(f"{way} - {other}" for way, other in DIFFERENCES)), differences)}

{shared.circumstances(WHAT, load_at_start)}"""


def _together(tests: Sequence[Test]) -> Test:
    hits = {way: np.concatenate([test.hits[way] for test in tests]) for way in WAYS}
    return Test("all cities", sum(test.num_database for test in tests), hits)


def main() -> None:
    """Every city, all cities together, the corridor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="cities (1 2 3)")
    parser.add_argument("--places", type=int, default=350, help="places, and queries, of each city (350)")
    parser.add_argument("--candidates", type=int, default=20, help="candidates re-ranked (20)")
    parser.add_argument("--weights", help="other weights than the committed ones")
    parser.add_argument("--corridor", type=Path, help="folder with database/, queries/ and ground_truth.csv")
    shared.add_report_option(parser, WHAT)
    options = parser.parse_args()
    load_at_start = os.getloadavg()[0]
    more = [f"rerank.num_candidates={options.candidates}", "index.num_retrieved=1", "describe.batch_size=32"]
    if options.weights:
        more.append(f"model.weights={options.weights}")
    tests = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            line = [f"output={folder}/{seed}", "benchmark=toy_city", f"benchmark.seed={seed}"]
            config = load(EvaluateConfig, [*line, f"benchmark.num_places={options.places}", *more])
            tests.append(run(config, f"city {seed}"))
        tests.append(_together(tests))
        if options.corridor is not None:
            line = [f"output={folder}/corridor", "benchmark=folders", f"benchmark.database={options.corridor}/database"]
            line += [
                f"benchmark.queries={options.corridor}/queries",
                f"benchmark.positives={options.corridor}/ground_truth.csv",
            ]
            tests.append(run(load(EvaluateConfig, [*line, *more]), "corridor (real photos)"))
    shared.publish(WHAT, report(tests, options.candidates, load_at_start), options.report)


if __name__ == "__main__":
    main()
