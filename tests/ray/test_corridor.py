"""The real corridor through the command line, against the original implementation's answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.runs import run_job, single_machine_predictions
from tests.support.shared import SHARED, needs_shared, parity_arrays, weights_of

pytestmark = needs_shared
TOLERANCE, STORED_TOLERANCE = 1e-4, 2e-4
ONE_PHOTO_GIB = 49 * 48 * 4 / 2**30


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line, without its output."""
    weights = tmp_path_factory.mktemp("weights") / "registers_mlp.pth"
    torch.save(weights_of(parity_arrays("registers_mlp"), "two/weights/"), weights)
    shape = json.loads((SHARED / "parity" / "registers_mlp.json").read_text())
    corridor = SHARED / "data" / "rtabmap_corridor"
    return [
        "benchmark=folders",
        f"benchmark.database={corridor}/database",
        f"benchmark.queries={corridor}/queries",
        f"benchmark.positives={corridor}/ground_truth.csv",
        "model=vitb",
        f"model.weights={weights}",
        "model.precision=fp32",
        f"model.image_size_px={shape['stage_two_px']}",
        f"model.descriptor_dim={shape['global_dim']}",
        f"model.encoder.embed_dim={shape['dim']}",
        f"model.encoder.depth={shape['depth']}",
        f"model.encoder.num_heads={shape['heads']}",
        f"model.encoder.pretrain_image_size_px={shape['pretrain_px']}",
        "model.encoder.num_trainable_blocks=1",
        f"model.decoder.embed_dim={shape['dec_dim']}",
        f"model.decoder.depth={shape['dec_depth']}",
        f"model.decoder.num_heads={shape['dec_heads']}",
        "rerank.num_candidates=10",
    ]


def _check_predictions(file: Path, tolerance: float = TOLERANCE) -> None:
    published = parity_arrays("corridor_evaluation")
    rows = pq.read_table(file).to_pylist()
    np.testing.assert_array_equal([row["candidates"][:20] for row in rows], published["candidates"])
    np.testing.assert_array_equal([row["reranked"] for row in rows], published["reranked"])
    for name, width, allowed in (("squared_distances", 20, TOLERANCE), ("pair_scores", 10, tolerance)):
        computed = np.array([row[name][:width] for row in rows])
        np.testing.assert_allclose(computed, published[name], rtol=0, atol=allowed)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["rerank.dense_features=cache", f"rerank.cache_gib={ONE_PHOTO_GIB}", "rerank.queries_per_unit=1"], TOLERANCE),
        (["rerank.dense_features=store"], STORED_TOLERANCE),
        *(
            pytest.param(options, TOLERANCE, marks=pytest.mark.soak)
            for options in (
                ["rerank.dense_features=recompute", "rerank.batch_size=7"],
                ["rerank.dense_features=cache", "rerank.num_loading_threads=3"],
                ["rerank.second_direction=10"],
            )
        ),
    ],
)
def test_single_machine(line: list[str], options: list[str], tolerance: float, tmp_path: Path) -> None:
    """Wherever dense features come from; a store's are rounded to 16 bits."""
    single_machine_predictions([*line, *options, f"output={tmp_path}/unused"], tmp_path / "predictions.parquet")
    _check_predictions(tmp_path / "predictions.parquet", tolerance)


@pytest.mark.soak
def test_three_shards_two_actors(line: list[str], tmp_path: Path) -> None:
    options = ["index.num_shards=3", "describe.num_actors=2", "rerank.num_actors=2", f"output={tmp_path}/out"]
    done = run_job("evaluate", [*line, *options])
    assert done.returncode == 0, done.stderr
    _check_predictions(tmp_path / "out" / "predictions.parquet")
    published = parity_arrays("corridor_evaluation")
    recall = json.loads((tmp_path / "out" / "metrics.json").read_text())["recall"]
    for position, n in enumerate(published["recall_k"].tolist()):
        assert recall["global"][str(n)] == pytest.approx(100 * published["recall_global"][position])
        assert recall["reranked"][str(n)] == pytest.approx(100 * published["recall_reranked"][position])
    descriptors = np.concatenate([np.load(tmp_path / f"out/index/shards/{i:05d}/descriptors.npy") for i in range(3)])
    np.testing.assert_allclose(descriptors, published["database_descriptors"], rtol=0, atol=TOLERANCE)
    queries = np.load(tmp_path / "out/queries/shards/00000/descriptors.npy")
    np.testing.assert_allclose(queries, published["query_descriptors"], rtol=0, atol=TOLERANCE)
