"""What commit 6add269 wrote is read as it was: an index of each kind, a finished run, a calibration, a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pairvpr.data.claim import check_claim
from pairvpr.data.training_sets import sfxl
from pairvpr.distributed.retrieve import read_candidates
from pairvpr.errors import UserError
from pairvpr.evaluation.compare import first_answer_is_right, read_run
from pairvpr.evaluation.confidence import read_calibration
from pairvpr.index import descriptor_shards
from pairvpr.index.generations import read_images, read_manifest
from pairvpr.index.reader import live_ids, search_index
from pairvpr.retrieval.dense_store import DenseStore
from pairvpr.training import checkpoint
from pairvpr.training.metrics_log import read_metrics
from tests.support.index import opened
from tests.support.runs import BEFORE_SEALS, unpack_before_seals


@pytest.fixture
def before(tmp_path: Path) -> Path:
    unpack_before_seals(tmp_path / "before")
    return tmp_path / "before"


@pytest.mark.parametrize(("kind", "folder"), [("flat", "run/index"), ("ivf_rabitq", "rabitq")])
def test_an_index_answers_as_it_did(before: Path, kind: str, folder: str) -> None:
    index = str(before / folder)
    manifest = read_manifest(index)
    assert manifest is not None
    assert manifest.kind == kind
    assert len(read_images(index, manifest)) == 60
    assert len(live_ids(index, manifest)) == 60
    _, queries = descriptor_shards.read_descriptors(str(before / "run" / "queries"))
    distances, ids = search_index(opened(index, manifest), queries, 10, num_threads=1)
    with np.load(BEFORE_SEALS / f"{kind}.npz") as found:
        assert (ids == found["ids"]).mean() > 0.98  # another CPU may swap what nearly ties
        np.testing.assert_allclose(distances, found["squared_distances"], atol=1e-5)


def test_a_run_is_known_as_finished_and_compared(before: Path) -> None:
    run = read_run(str(before / "run"))
    assert 100 * first_answer_is_right(run).mean() == pytest.approx(run.metrics["recall"]["reranked"]["1"])
    candidates = read_candidates(str(before / "run" / "candidates.parquet"))
    assert candidates is not None
    assert candidates.query_ids.tolist() == list(range(30))
    with np.load(BEFORE_SEALS / "flat.npz") as found:
        np.testing.assert_array_equal(candidates.ids, found["ids"])
    settings = json.loads((before / "run" / "settings.json").read_text())
    check_claim(str(before / "run"), settings, "output")
    with pytest.raises(UserError, match=r"index_num_shards 2 there, 3 now"):
        check_claim(str(before / "run"), settings | {"index_num_shards": 3}, "output")


def test_stored_dense_features_come_back(before: Path) -> None:
    dense = DenseStore.open(str(before / "run" / "dense"))
    dense.check()
    assert dense.manifest.num_images == 51
    assert dense.read(int(dense.manifest.shards[0].first_id)).shape == (16, 96)


def test_a_calibration_and_a_checkpoint_come_back(before: Path) -> None:
    found = read_calibration(str(before / "calibration.json"))
    assert (found.temperature, found.midpoint, found.round_size, found.stop_margin) == (1.5, 0.25, 4, 2.0)
    last = checkpoint.load(checkpoint.last_url(str(before / "training")), 2, "train.start")
    assert (last.position.epoch, last.position.step, last.settings) == (1, 5, {"train": {"lr": 0.01}})
    assert last.model["w"].shape == (3, 4)
    assert [row["step"] for row in read_metrics(str(before / "training"))] == [1, 5]


def test_a_cached_grouping_comes_back(before: Path) -> None:
    found = sfxl._read_cache(str(before / "sfxl.parquet"), "/root")
    assert found is not None
    assert found.offsets.tolist() == [0, 6, 12]
    assert found.utm_m[3].tolist() == [6.0, 7.0]
