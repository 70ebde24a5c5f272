"""Photos, weights, index and results on a real S3 server (OpenStack Swift) of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
import torch

from pairvpr.config.compose import load_evaluations
from pairvpr.models.weights import untrained_state
from tests.support.runs import arguments, run_job, single_machine_predictions, start_job, wait_until
from tests.support.swift_server import SwiftServer, running_swift


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    """The server, with an empty bucket `city`."""
    with running_swift(tmp_path_factory.mktemp("swift")) as server:
        _filesystem(server).mkdir("city")
        yield server


def _filesystem(server: SwiftServer) -> s3fs.S3FileSystem:
    return s3fs.S3FileSystem(
        key=server.access_key,
        secret=server.secret_key,
        endpoint_url=server.endpoint_url,
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def test_everything_on_s3(city: Path, tmp_path: Path, swift: SwiftServer) -> None:
    store = _filesystem(swift)
    weights = tmp_path / "weights.pth"
    local = arguments(city, tmp_path / "unused", f"model.weights={weights}")
    network = untrained_state(load_evaluations(arguments(city, "unused"))[0].model)
    torch.save({name: tensor + 0.01 for name, tensor in network.items()}, weights)
    expected = single_machine_predictions(local, tmp_path / "expected.parquet")
    store.put(str(city / "database"), "city/database", recursive=True)
    store.put(str(city / "queries"), "city/queries", recursive=True)
    store.put_file(str(weights), "city/weights.pth")

    line = arguments(
        "s3://city",
        "s3://city/out",
        "model.weights=s3://city/weights.pth",
        "index.path=s3://city/index",
        "index.num_shards=3",
    )
    driver = start_job("evaluate", line, **swift.environment)
    wait_until(lambda: store.exists("city/out/reranked/000001.parquet"), "the second unit")
    driver.kill()
    driver.communicate()
    resumed = run_job("evaluate", line, **swift.environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "kept from an earlier run" in resumed.stderr
    with store.open("city/out/predictions.parquet") as file:
        assert file.read() == expected
    assert store.exists("city/index/manifest.json")
    with store.open("city/index/images.parquet") as file:
        assert pq.read_table(file).num_rows == len(list((city / "database").iterdir()))
