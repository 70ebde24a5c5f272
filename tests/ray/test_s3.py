"""Photos, weights, index and results on a real S3 server (OpenStack Swift) of this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec.config
import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
import torch

from pairvpr.config.compose import load, load_evaluations
from pairvpr.config.schema import BuildIndexConfig, ClusterConfig, QueryConfig, ReportConfig, UpdateIndexConfig
from pairvpr.data import claim, stamps, storage
from pairvpr.data.manifest import Manifest
from pairvpr.distributed.runtime import ray_session
from pairvpr.errors import UserError
from pairvpr.models.weights import untrained_state
from pairvpr.report.export import export
from pairvpr.report.make import make_report
from ray_jobs.build_index import build_index
from ray_jobs.query import query
from ray_jobs.update_index import update_index
from tests.support.claims import claim_twice_at_once, slow_down
from tests.support.finished import draw_photos, make_run
from tests.support.flaky_proxy import running_flaky_proxy
from tests.support.runs import (
    SMALL_NETWORK,
    arguments,
    kill_when,
    run_job,
    single_machine_predictions,
    start_job,
)
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


@pytest.mark.soak
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
        f"index.cache_dir={tmp_path}/cache",
    )
    driver = start_job("evaluate", line, **swift.environment)
    kill_when(driver, lambda: store.exists("city/out/reranked/000001.parquet"), "the second unit")
    resumed = run_job("evaluate", line, **swift.environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "kept from an earlier run" in resumed.stderr
    with store.open("city/out/predictions.parquet") as file:
        assert file.read() == expected
    assert store.exists("city/index/manifest.json")
    with store.open("city/index/images.parquet") as file:
        assert pq.read_table(file).num_rows == len(list((city / "database").iterdir()))


def test_an_index_lives_on_a_store_that_fails_one_request_in_ten(
    city: Path, tmp_path: Path, swift: SwiftServer
) -> None:
    """Built (and killed, and resumed), searched and updated: the answers are those of local disk."""
    store = _filesystem(swift)
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((city / "database").iterdir())[::2]:
        shutil.copy(path, photos)
    store.put(str(photos), "city/living", recursive=True)
    names = sorted(path.name for path in photos.iterdir())
    (tmp_path / "gone.txt").write_text("\n".join(names[:5]))
    (tmp_path / "again.txt").write_text("\n".join(names[8:12]))
    with running_flaky_proxy(swift.endpoint_url, 0.1, seed=0) as proxy:
        environment = swift.environment | {"AWS_ENDPOINT_URL": proxy.endpoint_url}
        remote = _Living("s3://city/living", "s3://city/living_index", city, tmp_path, "index.cache_gib=0.001")
        builder = start_job("build_index", remote.build, **environment)
        kill_when(builder, lambda: store.exists("city/living_index/shards/00001/described.json"), "a described shard")
        for job, line in remote.jobs():
            done = run_job(job, line, **environment)
            assert done.returncode == 0, done.stderr
        assert sum(proxy.failures.values()) > 0.05 * proxy.num_requests
        assert len(proxy.failures) >= 4
    local = _Living(str(photos), str(tmp_path / "index"), city, tmp_path)
    with ray_session(ClusterConfig(num_cpus=2)):
        build_index(load(BuildIndexConfig, local.build))
        update_index(load(UpdateIndexConfig, local.update))
        query(load(QueryConfig, local.query))
    assert pq.read_table(remote.predictions).equals(pq.read_table(local.predictions))
    assert pq.read_table(local.predictions).num_rows == 13


@pytest.mark.soak
def test_dense_features_lie_on_a_store_that_fails_one_request_in_ten(
    city: Path, tmp_path: Path, swift: SwiftServer
) -> None:
    settings = ["rerank.dense_features=store", "rerank.store_path=s3://city/dense", "rerank.num_actors=1"]
    line = arguments(city, tmp_path / "out", *settings)
    expected = single_machine_predictions(line, tmp_path / "expected.parquet")
    with running_flaky_proxy(swift.endpoint_url, 0.1, seed=0) as proxy:
        environment = swift.environment | {"AWS_ENDPOINT_URL": proxy.endpoint_url}
        done = run_job("evaluate", line, **environment)
        assert done.returncode == 0, done.stderr
        assert sum(proxy.failures.values()) > 0
    assert (tmp_path / "out" / "predictions.parquet").read_bytes() == expected
    assert _filesystem(swift).exists("city/dense/manifest.json")


def test_a_photo_replaced_on_a_store_is_noticed_by_its_etag(
    swift: SwiftServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Other bytes of the same size, at once: neither size nor a time in whole seconds tells them apart."""
    keys = {"key": swift.access_key, "secret": swift.secret_key, "endpoint_url": swift.endpoint_url}
    monkeypatch.setitem(fsspec.config.conf, "s3", keys)
    photos = Manifest.of("s3://city/stamped", ["a.jpg", "b.jpg", "sub/c.jpg"])
    for image_id in range(3):
        storage.write_bytes(photos.url(image_id), b"one")
    stamps.write(str(tmp_path), stamps.stamps(photos))
    before = stamps.read(str(tmp_path))
    assert before is not None
    stamps.check_unchanged(photos, str(tmp_path))
    storage.write_bytes(photos.url(1), b"two")
    assert stamps.changed(before, stamps.stamps(photos)).tolist() == [1]
    assert stamps.changed(before, stamps.stamps_of(photos, np.arange(3))).tolist() == [1]
    with pytest.raises(UserError, match=r"1 of 3 photos have changed since .*, the first is b\.jpg"):
        stamps.check_unchanged(photos, str(tmp_path))
    storage.write_bytes(photos.url(1), b"one")
    stamps.check_unchanged(photos, str(tmp_path))


def test_a_report_and_exports_of_a_run_on_a_store(
    tmp_path: Path, swift: SwiftServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run, photos, report and exports are all on S3; a photo that is gone says so. Files equal those of a disk."""
    keys = {"key": swift.access_key, "secret": swift.secret_key, "endpoint_url": swift.endpoint_url}
    monkeypatch.setitem(fsspec.config.conf, "s3", keys)
    made = make_run(tmp_path / "OUT", num_queries=12, num_database=20, photos="s3://city/seen")
    draw_photos(made.benchmark)
    here = Path(make_report(ReportConfig(run=made.folder))).read_text()
    for path in storage.list_files(made.folder):
        storage.write_bytes(f"s3://city/OUT/{path}", (tmp_path / "OUT" / path).read_bytes())
    pairs = {form: Path(export(made.folder, form)).read_bytes() for form in ("hloc", "csv")}
    shutil.rmtree(tmp_path / "OUT")
    report = make_report(ReportConfig(run="s3://city/OUT"))
    assert report == "s3://city/OUT/report.html"
    assert storage.read_bytes(report).decode().replace("s3://city/OUT", made.folder) == here
    assert here.count("data:image/") >= 12
    assert {form: storage.read_bytes(export("s3://city/OUT", form)) for form in pairs} == pairs
    storage.remove_file(made.benchmark.queries.url(3))
    assert "FileNotFoundError" in storage.read_bytes(make_report(ReportConfig(run="s3://city/OUT"))).decode()


@pytest.mark.parametrize("num_pairs", [15, pytest.param(1000, marks=pytest.mark.soak)])
def test_of_two_claims_at_once_never_both_succeed(
    swift: SwiftServer, monkeypatch: pytest.MonkeyPatch, num_pairs: int
) -> None:
    """This server answers two conditional writes of one moment with "created", both of them."""
    keys = {"key": swift.access_key, "secret": swift.secret_key, "endpoint_url": swift.endpoint_url}
    monkeypatch.setitem(fsspec.config.conf, "s3", keys)
    monkeypatch.setattr(claim, "SECONDS_BETWEEN_LOOKS", 0.01)
    slow_down(monkeypatch, 0.01)
    root = f"s3://city/claims-{num_pairs}"
    assert not storage.has_atomic_creation(root)
    outcomes = [claim_twice_at_once(f"{root}/{number}", 0.05, number) for number in range(num_pairs)]
    print(f"{num_pairs} pairs: {sum(map(any, outcomes))} with one success, {outcomes.count([True, True])} with two")
    assert [True, True] not in outcomes
    assert sum(map(any, outcomes)) > 0.9 * num_pairs


class _Living:
    """Command lines of an index that is built, updated and asked."""

    def __init__(self, photos: str, index: str, city: Path, folder: Path, *of_the_query: str) -> None:
        network = [*SMALL_NETWORK, "describe.batch_size=4", "describe.num_threads_per_actor=1"]
        output = folder / ("answers_remote" if "://" in index else "answers_local")
        self.predictions = output / "predictions.parquet"
        self.build = [f"database={photos}", f"output={index}", "index.num_shards=2", *network]
        self.build += ["index.kind=ivf_rabitq", "index.num_lists=4"]
        self.update = [f"index.path={index}", f"add={folder}/again.txt", f"remove={folder}/gone.txt", *network]
        self.update += ["compact=true", "index.compact_share=0.1", "single_writer=true"]
        self.query = [f"index.path={index}", f"queries={city}/queries", f"output={output}", *network]
        self.query += ["rerank.num_candidates=3", "rerank.num_threads_per_actor=1", "index.num_threads_per_actor=1"]
        self.query += [f"index.cache_dir={folder}/cache", *of_the_query]

    def jobs(self) -> list[tuple[str, list[str]]]:
        return [("build_index", self.build), ("update_index", self.update), ("query", self.query)]
