"""`Localizer` against the job `query`: the same photos get the same answers, byte for byte, without Ray."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pairvpr import DescribeConfig, Localizer, Match, PhotoError, RerankConfig, SearchConfig, Utm
from pairvpr.config.compose import load
from pairvpr.config.schema import BuildConfig, BuildIndexConfig, IndexKind, QueryConfig
from pairvpr.index.generations import commit, read_manifest
from pairvpr.index.make import LocalRunner, next_generation
from ray_jobs.build_index import build_index
from ray_jobs.query import query
from tests.support.runs import SMALL_NETWORK
from tests.support.shared import SHARED, needs_shared, parity_arrays, weights_of

pytestmark = pytest.mark.usefixtures("local_ray")

KINDS = (
    IndexKind.ivf_rabitq,
    *(pytest.param(kind, marks=pytest.mark.soak) for kind in (IndexKind.flat, IndexKind.flat_8bit, IndexKind.ivf_fp16)),
)
"""One of them in `make test`, because each asks the job several times, which starts actors anew."""
SECTIONS = {
    "describe": DescribeConfig(batch_size=4, num_threads_per_actor=1),
    "search": SearchConfig(num_threads_per_actor=1),
    "rerank": RerankConfig(num_candidates=10, batch_size=4, queries_per_unit=2, num_threads_per_actor=1),
}
LINE = (
    *SMALL_NETWORK,
    *("describe.batch_size=4", "describe.num_threads_per_actor=1", "index.num_threads_per_actor=1"),
    *("rerank.num_candidates=10", "rerank.batch_size=4", "rerank.queries_per_unit=2", "rerank.num_threads_per_actor=1"),
)


def asked_by_the_job(index: str, queries: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    query(load(QueryConfig, [f"index.path={index}", f"queries={queries}", f"output={output}", *LINE, *more]))
    return pq.read_table(output / "predictions.parquet").to_pylist()


def assert_same(answers: list[list[Match] | PhotoError], rows: list[dict[str, Any]]) -> None:
    """Ids, squared distances, pair scores and confidence, bit by bit; a broken photo has an error in its place."""
    assert len(answers) == len(rows)
    for matches, row in zip(answers, rows, strict=True):
        if isinstance(matches, PhotoError):
            assert not row["candidates"]
            assert row["query_path"] in matches.photo
            continue
        distance_of = dict(zip(row["candidates"], row["squared_distances"], strict=True))
        assert [match.database_id for match in matches] == row["reranked"]
        assert [match.pair_score for match in matches] == row["pair_scores"]
        assert [match.squared_distance for match in matches] == [distance_of[one] for one in row["reranked"]]
        assert (matches[0].confidence if matches else None) == row["confidence"]


@pytest.fixture(scope="module")
def flat_index(city: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    line = [f"database={city}/database", f"output={tmp_path_factory.mktemp('flat')}/index", "positions=names"]
    options = ("index.kind=flat", "index.num_shards=3", "describe.batch_size=4", "describe.num_threads_per_actor=1")
    return build_index(load(BuildIndexConfig, [*line, *options, *SMALL_NETWORK]))


@pytest.fixture(scope="module", params=KINDS)
def index(request: pytest.FixtureRequest, flat_index: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The drawn city, which has copies that tie, in three shards of a kind."""
    if request.param is IndexKind.flat:
        return flat_index
    directory = shutil.copytree(flat_index, tmp_path_factory.mktemp("index") / "index")
    manifest = read_manifest(flat_index)
    assert manifest is not None
    num_lists = 4 if request.param.startswith("ivf") else None
    config = BuildConfig(kind=request.param, num_lists=num_lists, num_build_threads=1)
    draft = replace(manifest, generation=2)
    commit(str(directory), next_generation(str(directory), draft, config, 1e12, LocalRunner()))
    return str(directory)


def localizer_of(index: str, **more: Any) -> Localizer:
    about = json.loads((Path(index) / "settings.json").read_text())["model"]
    del about["weights_sha256"]
    network = load(QueryConfig, ["index.path=x", "queries=x", "output=x", *SMALL_NETWORK]).model
    assert network.settings() == about
    return Localizer.open(index, model=network, **SECTIONS, **more)


def test_equals_the_job(index: str, city: Path, tmp_path: Path) -> None:
    """A folder of photos, one of them broken, for every kind of index; shards that are kept, and ones that are not."""
    rows = asked_by_the_job(index, city / "queries", tmp_path / "all")
    photos = [city / "queries" / row["query_path"] for row in rows]
    for memory_gib in (None, 0.0):
        localizer = localizer_of(index, memory_gib=memory_gib)
        assert_same(localizer.locate(photos, k=10), rows)
    assert sum(not row["candidates"] for row in rows) == 1
    middle = np.mean([[match.utm.east_m, match.utm.north_m] for match in localizer.locate(photos[0]) if match.utm], 0)
    near = asked_by_the_job(
        index, city / "queries", tmp_path / "near", "filter.near_m=30", f"filter.center={middle.tolist()}"
    )
    assert 0 < len(near[0]["reranked"]) < 10
    assert_same(localizer.locate(photos, k=10, near=Utm(*middle.tolist()), radius_m=30), near)


@pytest.mark.soak
def test_one_photo_equals_a_folder_of_one(index: str, city: Path, tmp_path: Path) -> None:
    """By path, bytes, image or array; near its own prior position, as the job takes it from the photo's name."""
    photo = sorted((city / "queries").iterdir())[5]
    (tmp_path / "queries").mkdir()
    shutil.copy(photo, tmp_path / "queries" / photo.name)
    rows = asked_by_the_job(index, tmp_path / "queries", tmp_path / "one")
    localizer = localizer_of(index)
    with Image.open(photo) as image:
        forms = [photo, str(photo), photo.read_bytes(), image, np.array(image)]
        for form in forms:
            assert_same([localizer.locate(form, k=10)], rows)
    prior = Utm(*(float(field) for field in photo.name.split("@")[1:3]))
    near = asked_by_the_job(index, tmp_path / "queries", tmp_path / "near", "filter.near_m=25")
    assert_same([localizer.locate(photo, k=10, near=prior, radius_m=25)], near)
    turned = ("filter.within_deg=40", "filter.heading_deg=90")
    rows = asked_by_the_job(index, tmp_path / "queries", tmp_path / "turned", *turned)
    assert_same([localizer.locate(photo, k=10, within_deg=40, heading_deg=90)], rows)


def test_build_equals_the_job(city: Path, flat_index: str, tmp_path: Path) -> None:
    """Every file but those that say how long it took; then a photo is gone, and one is another."""
    shutil.copytree(city / "database", tmp_path / "database")
    line = [f"database={tmp_path}/database", f"output={tmp_path}/job", "positions=names", *SMALL_NETWORK]
    settings = ("index.kind=flat", "describe.batch_size=4", "describe.num_threads_per_actor=1")
    build_index(load(BuildIndexConfig, [*line, *settings]))
    network = load(QueryConfig, ["index.path=x", "queries=x", "output=x", *SMALL_NETWORK]).model
    Localizer.build(
        tmp_path / "database",
        tmp_path / "built",
        model=network,
        positions="names",
        kind="flat",
        device="cpu",
        describe=SECTIONS["describe"],
    )
    by_job, built = (_files(tmp_path / name) for name in ("job", "built"))
    assert by_job == built

    photos = sorted((tmp_path / "database").iterdir())
    photos[1].unlink()
    shutil.copy(photos[3], photos[4])
    rows = asked_by_the_job(f"{tmp_path}/job", city / "queries", tmp_path / "all")
    localizer = localizer_of(f"{tmp_path}/built")
    assert_same(localizer.locate([city / "queries" / row["query_path"] for row in rows], k=10), rows)
    assert sum(score == -np.inf for row in rows for score in row["pair_scores"]) > 0


def _files(directory: Path) -> dict[str, bytes | dict[str, Any]]:
    """The content of every file by its path, without seconds, and the seals over them; `status.json` is no result."""
    found: dict[str, bytes | dict[str, Any]] = {}
    for file in (path for path in directory.rglob("*") if path.is_file() and path.name != "status.json"):
        found[str(file.relative_to(directory))] = file.read_bytes()
        if file.name == "described.json":
            found[str(file.relative_to(directory))] = json.loads(file.read_text()) | {"seconds": None, "seal": None}
    return found


@needs_shared
@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_corridor(kind: IndexKind, tmp_path: Path) -> None:
    """Real photos, with the original's small network."""
    weights = tmp_path / "registers_mlp.pth"
    shape = json.loads((SHARED / "parity" / "registers_mlp.json").read_text())
    torch.save(weights_of(parity_arrays("registers_mlp"), "two/weights/"), weights)
    corridor = SHARED / "data" / "rtabmap_corridor"
    network = [
        "model=vitb",
        f"model.weights={weights}",
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
    ]
    index = tmp_path / "index"
    line = [f"database={corridor}/database", f"output={index}", "index.kind=flat", "index.num_shards=2", *network]
    build_index(load(BuildIndexConfig, line))
    if kind is not IndexKind.flat:
        manifest = read_manifest(str(index))
        assert manifest is not None
        config = BuildConfig(kind=kind, num_lists=4 if kind.startswith("ivf") else None)
        commit(str(index), next_generation(str(index), replace(manifest, generation=2), config, 1e12, LocalRunner()))
    line = [f"index.path={index}", f"queries={corridor}/queries", f"output={tmp_path}/out", "rerank.num_candidates=10"]
    query(load(QueryConfig, [*line, *network]))
    rows = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pylist()
    localizer = Localizer.open(index, weights=weights, rerank=RerankConfig(num_candidates=10))
    assert_same(localizer.locate([corridor / "queries" / row["query_path"] for row in rows], k=10), rows)


@pytest.mark.parametrize("change", ["gone", pytest.param("changed", marks=pytest.mark.soak)])
def test_a_lost_candidate_costs_a_distributed_run_what_it_costs_one_machine(
    flat_index: str, city: Path, tmp_path: Path, change: str
) -> None:
    """The scores are those that a single machine gives to all candidates; the lost one comes last and is named."""
    photos = sorted((city / "queries").iterdir())
    whole = localizer_of(flat_index).locate(photos, k=10)
    lost = next(matches[0] for matches in whole if not isinstance(matches, PhotoError))
    victim = Path(lost.url)
    kept, modified_ns = victim.read_bytes(), victim.stat().st_mtime_ns
    victim.unlink() if change == "gone" else victim.write_bytes(kept + b" ")
    try:
        rows = asked_by_the_job(flat_index, city / "queries", tmp_path / "out")
        alone = localizer_of(flat_index).locate(photos, k=10)
    finally:
        victim.write_bytes(kept)
        os.utime(victim, ns=(modified_ns, modified_ns))
    num_queries = 0
    for matches, row, its in zip(whole, rows, alone, strict=True):
        if isinstance(matches, PhotoError) or isinstance(its, PhotoError):
            continue
        others = [match for match in matches if match.database_id != lost.database_id]
        is_lost = len(others) < len(matches)
        last = ([lost.database_id], [-np.inf]) if is_lost else ([], [])
        assert row["reranked"] == [match.database_id for match in others] + last[0]
        assert row["pair_scores"] == [match.pair_score for match in others] + last[1]
        assert [match.database_id for match in its if match.pair_score != -np.inf] == row["reranked"][: len(others)]
        num_queries += is_lost
    assert num_queries > 1
    unscored = json.loads((tmp_path / "out" / "metrics.json").read_text())["unscored_candidates"]
    assert list(unscored) == [lost.path]
