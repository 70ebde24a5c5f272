"""The committed weights of the small network: what the demo shows is learnt, on streets that no training saw."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data.benchmarks import load_benchmark, prepare_benchmark
from pairvpr.evaluation.recall import recall_at
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline

MAX_PARAMETERS, MAX_SIDE_PX, MAX_BYTES = 1_500_000, 111, 4 * 2**20
NUM_PLACES = 40


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The pipeline sets torch's threads; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """What `make demo` runs, on another city."""
    line = ["benchmark=toy_city", "benchmark.seed=77", f"benchmark.num_places={NUM_PLACES}", f"output={tmp_path}"]
    return load(EvaluateConfig, [*line, "rerank.num_candidates=10"])


def recalls_at_1(config: EvaluateConfig) -> tuple[float, float]:
    """By global descriptor, and re-ranked."""
    prepare_benchmark(config.benchmark, config.output)
    benchmark = load_benchmark(config.benchmark, config.output)
    assert benchmark.positives is not None
    answers = pipeline.run(
        benchmark, build_model(config.model, load_weights(config.model), torch.device("cpu")), config
    )
    rankings = [answer.candidates for answer in answers], [answer.reranked for answer in answers]
    found, reranked = (recall_at(ranked, benchmark.positives, [1])[1] for ranked in rankings)
    return found, reranked


@pytest.mark.slow
def test_is_small(config: EvaluateConfig) -> None:
    weights = load_weights(config.model)
    assert not weights.untrained
    assert sum(array.size for array in weights.arrays.values()) < MAX_PARAMETERS
    assert config.model.image_size_px <= MAX_SIDE_PX
    assert config.model.weights is not None
    assert Path(config.model.weights).stat().st_size < MAX_BYTES


@pytest.mark.slow
def test_has_learnt(config: EvaluateConfig) -> None:
    """Measured with intervals, on more cities, by `benchmarks/tiny_model.py`; here a wide margin of that."""
    trained, reranked = recalls_at_1(config)
    by_descriptor_alone = replace(config.rerank, num_candidates=1)
    untrained, _ = recalls_at_1(replace(config, model=replace(config.model, weights=None), rerank=by_descriptor_alone))
    assert trained >= untrained + 25
    assert reranked >= trained
