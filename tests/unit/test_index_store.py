"""An index directory: written, finished, read back, and refused when it is damaged, newer, or another network's."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index import store
from pairvpr.index.build import FILES, build_shard
from pairvpr.index.merge import merge_top_k
from pairvpr.index.search import load_shard, search

MODEL = {"name": "small", "weights_sha256": "ab" * 32}
PATHS = [f"{number:02d}.jpg" for number in range(11)]
REJECTED = {2: "UnidentifiedImageError: no photo", 10: "OSError: truncated", 9: "FileNotFoundError: no such file"}


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "index") if request.param == "local" else f"memory://{uuid4().hex}/index"


def descriptors_of(ids: list[int]) -> np.ndarray:
    """Rows of four numbers that tell ids apart."""
    return np.array([[image_id, image_id % 3, 1, 0] for image_id in ids], np.float32).reshape(-1, 4)


def write_index(directory: str, num_shards: int = 3) -> store.IndexManifest:
    """An index of `PATHS` without the rejected ones, shard by shard as the jobs do it."""
    images = Manifest.of("/photos", PATHS)
    images.write(storage.join(directory, "images.parquet"))
    described = []
    for shard in store.shard_ranges(len(PATHS), num_shards):
        covered = range(shard.first_id, shard.stop_id)
        ids = [image_id for image_id in covered if image_id not in REJECTED]
        about = store.ShardDescription(
            first_id=shard.first_id,
            count=shard.count,
            num_rows=len(ids),
            rejected={image_id: error for image_id, error in REJECTED.items() if image_id in covered},
            seconds=0.5,
        )
        assert store.read_shard_description(directory, shard.shard) is None
        store.write_shard_description(directory, shard.shard, np.array(ids, np.int64), descriptors_of(ids), about)
        assert store.read_shard_description(directory, shard.shard) == about
        described.append(about)
    assert store.read_description(directory) is None
    store.finish_description(directory, images, described)
    manifest = store.IndexManifest(
        model=MODEL,
        descriptor_dim=4,
        num_images=len(PATHS),
        images_root="/photos",
        shards=[build_shard(directory, shard) for shard in range(num_shards)],
    )
    assert store.read_manifest(directory) is None
    store.write_manifest(directory, manifest)
    return manifest


def test_round_trip(directory: str) -> None:
    manifest = write_index(directory)
    assert store.read_manifest(directory) == manifest
    assert store.read_description(directory) == {
        "num_images": 11,
        "num_shards": 3,
        "num_rejected": 3,
        "seconds": 1.5,
    }
    ids, descriptors = store.read_descriptors(directory)
    kept = [image_id for image_id in range(11) if image_id not in REJECTED]
    assert ids.tolist() == kept
    np.testing.assert_array_equal(descriptors, descriptors_of(kept))
    queries = descriptors_of([2, 7])
    parts = []
    for shard, row in enumerate(manifest.shards):
        loaded = load_shard(directory, shard, row["sha256"])
        parts.append(search(loaded, queries, 3, num_threads=1))
    distances, found = merge_top_k(parts, 3)
    brute = ((queries[:, None] - descriptors[None]) ** 2).sum(axis=2)
    assert found.tolist() == [[kept[row] for row in np.lexsort((kept, line))[:3]] for line in brute]
    np.testing.assert_array_equal(distances, np.sort(brute, axis=1)[:, :3])


def test_the_files_are_those_of_the_format(tmp_path: Path) -> None:
    write_index(str(tmp_path))
    names = {"manifest.json", "described.json", "images.parquet", "rejected.parquet"}
    for shard in range(3):
        names |= {f"shards/{shard:05d}/{name}" for name in (*FILES, "described.json")}
    assert set(storage.list_files(str(tmp_path))) == names
    rejected = pq.read_table(tmp_path / "rejected.parquet")
    assert rejected.schema == store.REJECTED_SCHEMA
    assert rejected.to_pylist() == [
        {"path": PATHS[image_id], "error": error} for image_id, error in sorted(REJECTED.items())
    ]
    content = storage.read_json(str(tmp_path / "manifest.json"))
    assert (content["format_version"], content["metric"], content["kind"], content["factory"]) == (
        1,
        "L2",
        "flat",
        "Flat",
    )
    shard = tmp_path / "shards" / "00001"
    row = content["shards"][1]
    assert (row["first_id"], row["count"], row["num_rows"]) == (3, 4, 4)
    for name in FILES:
        assert row["bytes"][name] == (shard / name).stat().st_size
        assert row["sha256"][name] == storage.sha256(str(shard / name))
    ids, descriptors = np.load(shard / "ids.npy"), np.load(shard / "descriptors.npy", mmap_mode="r")
    assert (ids.dtype, ids.tolist()) == (np.int64, [3, 4, 5, 6])
    assert (descriptors.dtype, descriptors.shape) == (np.float32, (4, 4))
    index = faiss.read_index(str(shard / "index.faiss"))
    np.testing.assert_array_equal(index.reconstruct_n(0, 4), descriptors)


def test_building_a_shard_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = write_index(str(tmp_path))
    before = (tmp_path / "shards/00000/index.faiss").read_bytes()
    assert build_shard(str(tmp_path), 0) == manifest.shards[0]
    assert (tmp_path / "shards/00000/index.faiss").read_bytes() == before


def test_a_shard_of_rejected_photos_alone(tmp_path: Path) -> None:
    about = store.ShardDescription(first_id=0, count=1, num_rows=0, rejected={0: "broken"}, seconds=0.0)
    store.write_shard_description(str(tmp_path), 0, np.empty(0, np.int64), np.empty((0, 4), np.float32), about)
    row = build_shard(str(tmp_path), 0)
    shard = load_shard(str(tmp_path), 0, row["sha256"])
    distances, ids = search(shard, descriptors_of([1, 2]), 5, num_threads=1)
    assert distances.shape == ids.shape == (2, 0)


@given(st.integers(0, 200), st.integers(1, 30))
def test_shards_cover_every_id_once_and_evenly(num_images: int, num_shards: int) -> None:
    ranges = store.shard_ranges(num_images, num_shards)
    assert [shard.shard for shard in ranges] == list(range(num_shards))
    covered = [image_id for shard in ranges for image_id in range(shard.first_id, shard.stop_id)]
    assert covered == list(range(num_images))
    counts = [shard.count for shard in ranges]
    assert max(counts) - min(counts) <= 1


def flip(url: str, position: int) -> None:
    data = bytearray(storage.read_bytes(url))
    data[position] ^= 1
    storage.write_bytes(url, bytes(data))


@pytest.mark.parametrize("position", [0, 60, -1])
def test_a_flipped_byte_is_refused_by_name(directory: str, position: int) -> None:
    manifest = write_index(directory)
    url = store.shard_url(directory, 1, "index.faiss")
    flip(url, position)
    with pytest.raises(UserError) as caught:
        load_shard(directory, 1, manifest.shards[1]["sha256"])
    assert url in str(caught.value)
    assert "damaged" in str(caught.value)
    load_shard(directory, 0, manifest.shards[0]["sha256"])


def test_no_manifest_no_index(tmp_path: Path) -> None:
    assert store.read_manifest(str(tmp_path)) is None
    assert store.read_manifest(str(tmp_path / "missing")) is None
    (tmp_path / "file").touch()
    assert store.read_manifest(str(tmp_path / "file")) is None


@pytest.mark.parametrize("version", [store.FORMAT_VERSION + 1, 0, None, "1"])
def test_another_format_version_is_refused(directory: str, version: object) -> None:
    manifest = write_index(directory)
    content = asdict(manifest) | {"format_version": version, "something_new": 3}
    storage.write_json(storage.join(directory, "manifest.json"), content)
    with pytest.raises(UserError, match=f"index format {version}; this version reads {store.FORMAT_VERSION}"):
        store.read_manifest(directory)


@pytest.mark.parametrize(
    "content", ["not json", "", "[]", "3", '"text"', "null", '{"format_version": 1}', '{"format_version": 1, "x": 2}']
)
def test_a_manifest_of_something_else_is_a_users_mistake(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError) as caught:
        store.read_manifest(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_an_index_of_other_weights_is_refused(tmp_path: Path) -> None:
    manifest = write_index(str(tmp_path))
    store.check_model(str(tmp_path), manifest, name="renamed", weights_sha256="ab" * 32)
    with pytest.raises(UserError) as caught:
        store.check_model(str(tmp_path), manifest, name="vitb", weights_sha256="cd" * 32)
    for part in (str(tmp_path), "small", "vitb", "abababababab", "cdcdcdcdcdcd"):
        assert part in str(caught.value)
    other = replace(manifest, model=MODEL | {"weights_sha256": "ab" * 31 + "ac"})
    with pytest.raises(UserError):
        store.check_model(str(tmp_path), other, name="small", weights_sha256="ab" * 32)
