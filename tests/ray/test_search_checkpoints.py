"""Every checkpoint of a training, evaluated: the table's numbers, what is skipped, what fails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pairvpr.config.compose import load
from pairvpr.config.schema import EvaluateConfig
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.evaluation.recall import recall_at
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import pipeline
from tests.support.runs import arguments as evaluation_arguments
from tests.support.runs import run_job
from tests.support.training import arguments, draw_training_set, train_here


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of two epochs of stage two, and one that is of no use."""
    folder = tmp_path_factory.mktemp("training")
    draw_training_set(folder)
    train_here(2, arguments(2, folder, folder / "out", "train.lr=0.001"))
    found = folder / "out" / "checkpoints"
    torch.save({"model": {"foreign": torch.zeros(1)}}, found / "epoch_0003.pt")
    return found


def test_search(city: Path, checkpoints: Path, tmp_path: Path) -> None:
    line = [
        word for word in evaluation_arguments(city, tmp_path / "out", "cluster.num_cpus=2") if "weights" not in word
    ]
    searched = run_job("search_checkpoints", [*_without_index(line), f"checkpoints={checkpoints}"])
    assert searched.returncode == 1
    assert "1 of 3 checkpoints failed: epoch_0003.pt" in searched.stderr
    assert "Traceback" not in searched.stderr
    rows = pq.read_table(tmp_path / "out" / "checkpoints.parquet").to_pylist()
    assert [row["checkpoint"] for row in rows] == ["epoch_0001.pt", "epoch_0002.pt", "epoch_0003.pt"]
    assert "foreign" in rows[2]["error"]
    assert rows[2]["global_recall@1"] is None
    for row in rows[:2]:
        _check(row, line, checkpoints / row["checkpoint"])
    best = max(rows[:2], key=lambda row: (row["reranked_recall@1"], row["global_recall@1"]))
    assert f"best: {best['checkpoint']}" in searched.stdout
    assert (tmp_path / "out" / "checkpoints.csv").read_text().count("\n") == 4

    results = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").iterdir()}
    shutil.copy(checkpoints / "epoch_0001.pt", checkpoints / "epoch_0003.pt")
    again = run_job("search_checkpoints", [*_without_index(line), f"checkpoints={checkpoints}"])
    assert again.returncode == 0, again.stderr
    assert all(file.stat().st_mtime_ns == written for file, written in results.items())  # not done twice
    mended = pq.read_table(tmp_path / "out" / "checkpoints.parquet").to_pylist()
    assert {**mended[2], "checkpoint": "epoch_0001.pt", "weights_sha256": ""} == {**rows[0], "weights_sha256": ""}


def _without_index(line: list[str]) -> list[str]:
    """The search of checkpoints keeps no index."""
    return [word for word in line if not word.startswith("index.")]


def _check(row: dict[str, float], line: list[str], checkpoint: Path) -> None:
    """Against the single machine's answers."""
    config = load(EvaluateConfig, [*line, f"model.weights={checkpoint}"])
    benchmark = load_benchmark(config.benchmark, config.output)
    answers = pipeline.run(
        benchmark, build_model(config.model, load_weights(config.model), torch.device("cpu")), config
    )
    assert benchmark.positives is not None
    for step, ranked in (
        ("global", [answer.candidates for answer in answers]),
        ("reranked", [answer.reranked for answer in answers]),
    ):
        recalls = recall_at(ranked, benchmark.positives, (1, 5, 10))
        assert {n: row[f"{step}_recall@{n}"] for n in recalls} == recalls


def test_an_empty_folder_is_a_mistake(city: Path, tmp_path: Path) -> None:
    line = evaluation_arguments(city, tmp_path / "out")
    stopped = run_job("search_checkpoints", [*_without_index(line), f"checkpoints={tmp_path}"])
    assert stopped.returncode == 2
    assert "no checkpoint found" in stopped.stderr
