"""Runs that re-rank from a store of dense features: the predictions of one machine without a store, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import BuildIndexConfig, ClusterConfig, QueryConfig
from pairvpr.distributed.runtime import ray_session
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.retrieval import dense_store
from pairvpr.retrieval.dense_store import DenseStore
from ray_jobs.build_index import build_index
from ray_jobs.evaluate import evaluate
from ray_jobs.query import query
from tests.support.runs import ROOT, arguments, kill_when, single_machine_predictions, wait_gone

SMALL_SHARDS = 3 * 16 * 96 * 2
"""Bytes of three records of the small network."""
STORE = "rerank.dense_features=store"
CODE = f"""
import sys
from pairvpr.retrieval import dense_store
dense_store.SHARD_BYTES = {SMALL_SHARDS // 3}
from ray_jobs.evaluate import main
main(sys.argv[1:])
"""


def file_times(folder: Path, pattern: str) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.glob(pattern)}


def num_readable(city: Path) -> int:
    """Photos of the city's database; one is broken."""
    return len(list((city / "database").iterdir())) - 1


def test_a_store_of_the_candidates_gives_the_same_predictions(
    city: Path, expected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_store, "SHARD_BYTES", SMALL_SHARDS)
    options = [STORE, "rerank.num_actors=2"]
    predictions = single_machine_predictions(arguments(city, "unused", *options), tmp_path / "expected.parquet")
    assert predictions != expected  # rounding is seen, so a store that is not read would be, too
    with ray_session(ClusterConfig(num_cpus=4)):
        (content,) = evaluate(load_evaluations(arguments(city, tmp_path / "out", *options)))
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == predictions
    union = DenseStore.open(f"{tmp_path}/out/dense").manifest
    assert union.num_images < num_readable(city)
    assert content["dense_store"]["num_images"] == union.num_images
    assert content["dense_store"]["seconds"] > 0
    assert content["kib_per_image"]["dense"] == union.layout.record_bytes / 1024
    assert len(union.shards) == -(-union.num_images // (SMALL_SHARDS // union.layout.record_bytes))


@pytest.mark.soak
def test_a_store_of_the_whole_database_is_used_again_damaged_and_mended(
    city: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense_store, "SHARD_BYTES", SMALL_SHARDS)
    whole = [STORE, "rerank.num_actors=2", f"index.path={tmp_path}/index", f"rerank.store_path={tmp_path}/whole"]
    whole_database = "rerank.store_whole_database=true"
    predictions = single_machine_predictions(arguments(city, "unused", *whole), tmp_path / "expected.parquet")
    with ray_session(ClusterConfig(num_cpus=4)):
        evaluate(load_evaluations(arguments(city, tmp_path / "first", *whole, whole_database)))
        assert (tmp_path / "first" / "predictions.parquet").read_bytes() == predictions
        assert DenseStore.open(f"{tmp_path}/whole").manifest.num_images == num_readable(city)

        victim = tmp_path / "whole" / "shards" / "00001" / "records.npy"
        data = bytearray(victim.read_bytes())
        data[-1] ^= 1
        victim.write_bytes(data)
        second = arguments(city, tmp_path / "second", *whole)
        with pytest.raises(IncompleteRunError, match=r"shards/00001/records\.npy: damaged"):
            evaluate(load_evaluations(second))
        for name in ("records.npy", "ids.npy", "crc32.npy", "shard.json"):
            (victim.parent / name).unlink()
        with pytest.raises(UserError, match=r"shards/00001/shard\.json: missing; delete its folder and the store's"):
            evaluate(load_evaluations(second))
        (tmp_path / "whole" / "manifest.json").unlink()
        times = file_times(tmp_path / "whole", "shards/*/records.npy")
        evaluate(load_evaluations([*second, whole_database]))
        assert (tmp_path / "second" / "predictions.parquet").read_bytes() == predictions
        mended = file_times(tmp_path / "whole", "shards/*/records.npy")
        assert mended == times | {str(victim): mended[str(victim)]}


@pytest.mark.soak
def test_a_driver_that_dies_while_the_store_is_filled(city: Path, tmp_path: Path) -> None:
    line = arguments(city, tmp_path / "out", STORE, "rerank.stored_as=int8", "rerank.num_actors=1")
    expected = single_machine_predictions(line, tmp_path / "expected.parquet")
    driver = subprocess.Popen([sys.executable, "-c", CODE, *line], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    shards = "dense/shards/*/shard.json"
    children = kill_when(driver, lambda: any((tmp_path / "out").glob(shards)), "a finished shard")
    wait_gone([child for child in children if "_StoreActor" in child.name()])
    assert not (tmp_path / "out" / "dense" / "manifest.json").exists()
    survivors = file_times(tmp_path / "out", shards)

    again = subprocess.run(
        [sys.executable, "-c", CODE, *line], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert f"photos ({len(survivors)} kept from an earlier run)" in again.stderr  # one in each shard
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected
    assert survivors.items() <= file_times(tmp_path / "out", shards).items()
    wait_gone(children)


@pytest.mark.soak
def test_queries_use_a_store_in_eight_bits(city: Path, tmp_path: Path) -> None:
    form = [STORE, "rerank.stored_as=int8", "rerank.store_whole_database=true"]
    single_machine_predictions(arguments(city, "unused", *form), tmp_path / "expected.parquet")
    shared = [word for word in arguments(city, "unused") if word.split(".")[0] in ("model", "describe", "model=tiny")]
    rest = [word for word in arguments(city, "unused", *form) if word.split(".")[0] in ("rerank", "index")]
    with ray_session(ClusterConfig(num_cpus=4)):
        index = build_index(load(BuildIndexConfig, [f"database={city}/database", f"output={tmp_path}/index", *shared]))
        line = [f"index.path={index}", f"queries={city}/queries", f"output={tmp_path}/out", *shared, *rest]
        content = query(load(QueryConfig, line))
    assert content["dense_store"]["values"] == "int8"
    whole, alone = (pq.read_table(tmp_path / name) for name in ("expected.parquet", "out/predictions.parquet"))
    assert alone.drop(["positives"]).equals(whole.drop(["positives"]))
