"""Which store of dense features a run takes, and which it refuses before it loads weights or starts Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pairvpr.config.benchmark_schema import FoldersConfig
from pairvpr.config.compose import load
from pairvpr.config.schema import (
    DenseFeatures,
    EvaluateConfig,
    IndexConfig,
    OpenIndexConfig,
    QueryConfig,
    RerankConfig,
    StoredAs,
)
from pairvpr.config.train_schema import SearchCheckpointsConfig
from pairvpr.data.claim import claim
from pairvpr.data.manifest import folder_manifest
from pairvpr.distributed import dense
from pairvpr.distributed.dense import WHOLE_DATABASE, WantedStore, make_store
from pairvpr.errors import UserError
from pairvpr.retrieval import dense_store
from ray_jobs import evaluate as steps
from ray_jobs import query as query_steps
from ray_jobs.evaluate import prepare
from tests.support.index import write_index
from tests.support.small import small_evaluate_config

NO_SOURCE: Any = None


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Three photos, one query, a store of the whole database in a directory of its own."""
    for name in ("database/a.png", "database/b.png", "database/c.png", "queries/q.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 30)).save(tmp_path / name)
    benchmark = FoldersConfig(name="folders", database=f"{tmp_path}/database", queries=f"{tmp_path}/queries")
    shared = small_evaluate_config(f"{tmp_path}/out")
    rerank = replace(
        shared.rerank,
        dense_features=DenseFeatures.store,
        store_path=f"{tmp_path}/store",
        store_whole_database=True,
    )
    return replace(shared, benchmark=benchmark, index=IndexConfig(path=f"{tmp_path}/index"), rerank=rerank)


def wanted_by(config: EvaluateConfig) -> WantedStore:
    found = prepare([config])[0].store
    assert found is not None
    return found


def finish_store(wanted: WantedStore, ids: list[int], what: str = WHOLE_DATABASE) -> None:
    """A store that holds zeros for `ids`."""
    layout = wanted.layout
    shards = dense_store.cut(np.array(ids, np.int64), layout)
    for shard, ids_of_shard in enumerate(shards):
        features = [torch.zeros(layout.num_patches, layout.width)] * len(ids_of_shard)
        dense_store.write_shard(wanted.url, shard, ids_of_shard, layout, features)
    dense_store.finish(wanted.url, shards, layout, wanted.settings(what))


def changed(config: EvaluateConfig, **changes: Any) -> EvaluateConfig:
    return replace(config, rerank=replace(config.rerank, **changes))


def mistake(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def _queries_in_themselves(config: EvaluateConfig) -> FoldersConfig:
    assert isinstance(config.benchmark, FoldersConfig)
    return replace(config.benchmark, database=config.benchmark.queries)


OTHERS: dict[str, tuple[Callable[[EvaluateConfig], EvaluateConfig], str]] = {
    "precision": (lambda it: replace(it, model=replace(it.model, precision="bf16")), "model.precision fp32 there"),
    "threads": (lambda it: changed(it, num_threads_per_actor=2), "num_threads_per_actor 1 there, 2 now"),
    "form": (lambda it: changed(it, stored_as=StoredAs.int8), "stored_as half there, int8 now"),
    "database": (lambda it: replace(it, benchmark=_queries_in_themselves(it)), "database.root"),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("is_finished", [True, False])
def test_the_store_of_another_run_is_refused_before_weights_are_loaded(
    config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch, other: str, is_finished: bool
) -> None:
    wanted = wanted_by(config)
    if is_finished:
        finish_store(wanted, [0, 1, 2])
    else:
        claim(wanted.url, wanted.settings(WHOLE_DATABASE), "store")
    monkeypatch.setattr(steps, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    change, words = OTHERS[other]
    message = mistake(lambda: prepare([change(config)]))
    assert words in message
    assert f"rerank.store_path={wanted.url}" in message


@pytest.mark.parametrize("is_finished", [True, False])
def test_the_store_of_other_weights_is_refused(config: EvaluateConfig, is_finished: bool) -> None:
    wanted = wanted_by(config)
    other = replace(wanted, model=dict(wanted.model) | {"weights_sha256": "cd" * 32})
    if is_finished:
        finish_store(other, [0, 1, 2])
    else:
        claim(wanted.url, other.settings(WHOLE_DATABASE), "store")
    assert "model.weights_sha256 cdcd" in mistake(lambda: prepare([config]))


def test_a_store_is_shared_whatever_the_name_of_the_model_the_queries_and_the_index(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    wanted = wanted_by(config)
    finish_store(wanted, [0, 1, 2])
    before = sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("store/**"))
    model, index = replace(config.model, name="mine"), IndexConfig(path=f"{tmp_path}/other", num_shards=2)
    other = replace(config, model=model, index=index, output=f"{tmp_path}/elsewhere")
    asked = changed(other, store_whole_database=False, num_candidates=2, batch_size=1)
    store = make_store(wanted_by(asked), np.array([0, 2]), lambda: pytest.fail("not asked for"), NO_SOURCE)
    assert store.manifest.num_images == 3
    assert sorted(path.stat().st_mtime_ns for path in tmp_path.rglob("store/**")) == before


def test_a_candidate_that_the_store_lacks_is_named(config: EvaluateConfig) -> None:
    wanted = wanted_by(config)
    finish_store(wanted, [0, 2])
    message = mistake(lambda: make_store(wanted, np.array([0, 1, 2]), lambda: np.arange(3), NO_SOURCE))
    assert "the store lacks 1 of 3 candidates, the first is b.png;" in message


def test_the_store_of_other_candidates_is_refused(config: EvaluateConfig) -> None:
    some = changed(config, store_whole_database=False)
    finish_store(wanted_by(some), [0, 1], "ab" * 32)
    wanted = wanted_by(some)
    assert "ids abab" in mistake(lambda: make_store(wanted, np.array([0, 1]), lambda: np.arange(3), NO_SOURCE))
    assert "ids abab" in mistake(lambda: prepare([config]))


def test_a_damaged_store_is_found_before_a_run_begins(config: EvaluateConfig) -> None:
    wanted = wanted_by(config)
    finish_store(wanted, [0, 1, 2])
    manifest = Path(wanted.url) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"num_images": 3', '"num_images": 4'))
    assert f"{manifest}: damaged" in mistake(lambda: prepare([config]))


def test_a_store_that_the_disk_can_not_hold_is_refused(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = wanted_by(config)
    monkeypatch.setattr(dense, "disk_bytes", lambda _: 2 * wanted.layout.record_bytes)
    message = mistake(lambda: make_store(wanted, np.array([0]), lambda: np.arange(3), NO_SOURCE))
    assert "dense features of 3 photos take 0.75 KiB of disk, but only 0.50 KiB can be used" in message
    assert not Path(wanted.url).exists()


@pytest.mark.parametrize("name", ["out", "index", "out/queries", "queries/q.png"])
def test_a_store_is_a_directory_of_its_own(config: EvaluateConfig, tmp_path: Path, name: str) -> None:
    message = mistake(lambda: prepare([changed(config, store_path=f"{tmp_path}/{name}")]))
    assert message.startswith(f"rerank.store_path={tmp_path}/{name}: ")


def test_two_benchmarks_share_the_store_of_one_database_only(config: EvaluateConfig, tmp_path: Path) -> None:
    def two(asked: EvaluateConfig, **of_the_second: Any) -> list[EvaluateConfig]:
        names = ({"name": "first"}, {"name": "second"} | of_the_second)
        return [replace(asked, benchmark=replace(asked.benchmark, **of_one)) for of_one in names]

    first, second = prepare(two(config))
    assert first.store is not None
    assert second.store is not None
    assert first.store.url == second.store.url
    other = two(replace(config, index=IndexConfig()), database=f"{tmp_path}/queries")
    assert "these benchmarks have different databases; expected a separate store for each" in mistake(
        lambda: prepare(other)
    )
    of_each = changed(config, store_whole_database=False)
    assert "these benchmarks have different candidates" in mistake(lambda: prepare(two(of_each)))
    runs = prepare(two(changed(of_each, store_path=None)))
    assert [run.store.url for run in runs if run.store] == [
        f"{tmp_path}/out/{name}/dense" for name in ("first", "second")
    ]
    finish_store(first.store, [0, 1, 2])
    prepare(two(of_each))


def test_what_never_changes_a_result_is_no_setting_of_a_run(config: EvaluateConfig) -> None:
    settings = {}
    for way in DenseFeatures:
        asked = replace(config, rerank=replace(small_evaluate_config("unused").rerank, dense_features=way))
        settings[way] = prepare([asked])[0].settings()
    assert settings["recompute"] == settings["cache"]
    assert "stored_as" not in settings["cache"]["rerank"]
    assert settings["store"]["rerank"] == settings["cache"]["rerank"] | {"stored_as": "half"}
    assert prepare([config])[0].settings() == settings["store"]


def test_queries_refuse_the_store_of_another_model_before_weights_are_loaded(
    config: EvaluateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish_store(wanted_by(config), [0, 1, 2])
    photos = folder_manifest(f"{tmp_path}/database", "database")
    write_index(f"{tmp_path}/index", [], np.eye(3, 16, dtype=np.float32), images=photos)
    asked = QueryConfig(
        queries=f"{tmp_path}/queries",
        output=f"{tmp_path}/answers",
        model=replace(config.model, precision="fp16"),
        index=OpenIndexConfig(path=f"{tmp_path}/index"),
        rerank=config.rerank,
    )
    monkeypatch.setattr(query_steps, "load_weights", lambda *_: pytest.fail("weights were loaded"))
    assert "model.precision fp32 there, fp16 now" in mistake(lambda: query_steps.query(asked))


@pytest.mark.parametrize("setting", ["store_path=x", "store_whole_database=true"])
def test_settings_of_a_store_need_one(setting: str) -> None:
    message = mistake(lambda: load(EvaluateConfig, ["benchmark=toy_city", "output=o", f"rerank.{setting}"]))
    assert "rerank.dense_features=cache has no store; expected also rerank.dense_features=store" in message


def test_eight_bits_need_a_store_and_checkpoints_have_none() -> None:
    assert "rerank.stored_as=int8" in mistake(lambda: RerankConfig(stored_as=StoredAs.int8))
    line = ["checkpoints=c", "benchmark=toy_city", "model.weights=null", "output=o", "rerank.dense_features=store"]
    assert "not several checkpoints" in mistake(lambda: load(SearchCheckpointsConfig, line))
