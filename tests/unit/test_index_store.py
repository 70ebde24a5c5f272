"""An index directory: written, finished, read back, and refused when it is damaged, newer, or another network's."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict, replace
from pathlib import Path
from uuid import uuid4

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data import sealed, storage
from pairvpr.data.local_cache import LocalCache
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from pairvpr.index import descriptor_shards
from pairvpr.index.generations import (
    FORMAT_VERSION,
    IndexManifest,
    check_model,
    commit,
    generation_url,
    read_images,
    read_manifest,
)
from pairvpr.index.make import LocalRunner, described_shards, image_table, next_generation
from pairvpr.index.reader import OpenIndex, search_index
from tests.support.index import MODEL, PLENTY_BYTES, describe_rows, write_index

PATHS = [f"{number:02d}.jpg" for number in range(11)]
REJECTED = {2: "UnidentifiedImageError: no photo", 10: "OSError: truncated", 9: "FileNotFoundError: no such file"}
KEPT = [image_id for image_id in range(11) if image_id not in REJECTED]
FILES = ("ids.npy", "descriptors.npy", "index.faiss")


@pytest.fixture(params=["local", "memory"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "index") if request.param == "local" else f"memory://{uuid4().hex}/index"


def descriptors_of(ids: list[int]) -> np.ndarray:
    """Rows of four numbers that tell ids apart."""
    return np.array([[image_id, image_id % 3, 1, 0] for image_id in ids], np.float32).reshape(-1, 4)


def small_index(directory: str) -> IndexManifest:
    return write_index(directory, PATHS, descriptors_of(list(range(11))), [3, 7], rejected=REJECTED)


def open_index(directory: str, manifest: IndexManifest, tmp_path: Path) -> OpenIndex:
    return OpenIndex(directory, manifest, LocalCache(tmp_path / "cache", 1 << 30))


def test_round_trip(directory: str, tmp_path: Path) -> None:
    manifest = small_index(directory)
    assert read_manifest(directory) == manifest
    about = descriptor_shards.Description(num_images=11, num_shards=3, num_rejected=3, seconds=1.5)
    assert descriptor_shards.read_description(directory) == about
    assert (manifest.num_images, manifest.num_rejected, manifest.num_live) == (11, 3, 8)
    assert read_images(directory, manifest).paths == PATHS
    ids, descriptors = descriptor_shards.read_descriptors(directory)
    assert ids.tolist() == KEPT
    np.testing.assert_array_equal(descriptors, descriptors_of(KEPT))
    queries = descriptors_of([2, 7])
    distances, found = search_index(open_index(directory, manifest, tmp_path), queries, 3, num_threads=1)
    brute = ((queries[:, None] - descriptors[None]) ** 2).sum(axis=2)
    assert found.tolist() == [[KEPT[row] for row in np.lexsort((KEPT, line))[:3]] for line in brute]
    np.testing.assert_array_equal(distances, np.sort(brute, axis=1)[:, :3])


def test_the_files_are_those_of_the_format(tmp_path: Path) -> None:
    small_index(str(tmp_path))
    names = {"manifest.json", "generations/000001.json", "described.json", "images.parquet", "rejected.parquet"}
    for shard in range(3):
        names |= {f"shards/{shard:05d}/{name}" for name in (*FILES, "described.json", "index.faiss.json")}
    assert set(storage.list_files(str(tmp_path))) == names
    rejected = pq.read_table(tmp_path / "rejected.parquet")
    assert rejected.schema == descriptor_shards.REJECTED_SCHEMA
    assert rejected.to_pylist() == [
        {"path": PATHS[image_id], "error": error} for image_id, error in sorted(REJECTED.items())
    ]
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert {name: content[name] for name in ("format_version", "generation", "metric", "kind", "factory")} == {
        "format_version": 2,
        "generation": 1,
        "metric": "L2",
        "kind": "flat",
        "factory": "Flat",
    }
    row = content["shards"][1]
    assert (row["path"], row["first_id"], row["count"], row["num_rows"]) == ("shards/00001", 3, 4, 4)
    for name in FILES:
        path = tmp_path / "shards/00001" / name
        assert row["files"][name] == {
            "path": f"shards/00001/{name}",
            "bytes": path.stat().st_size,
            "sha256": storage.sha256(str(path)),
        }
    ids = np.load(tmp_path / "shards/00001/ids.npy")
    descriptors = np.load(tmp_path / "shards/00001/descriptors.npy", mmap_mode="r")
    assert (ids.dtype, ids.tolist()) == (np.int64, [3, 4, 5, 6])
    assert (descriptors.dtype, descriptors.shape) == (np.float32, (4, 4))
    index = faiss.read_index(str(tmp_path / "shards/00001/index.faiss"))
    np.testing.assert_array_equal(index.reconstruct_n(0, 4), descriptors)


@pytest.mark.slow
def test_made_twice_it_has_the_same_bytes(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
    paths = [f"{number:04d}.jpg" for number in range(3000)]
    config = BuildConfig(kind=IndexKind.ivf_rabitq, num_lists=16)
    write_index(str(tmp_path / "once"), paths, rows, [1000], config=config)
    write_index(str(tmp_path / "again"), paths, rows, [1000], config=config)
    files = storage.list_files(str(tmp_path / "once"))
    assert sum(name.startswith("trained-ivf16-rabitq-") for name in files) == 2  # and what says that it is finished
    assert files == storage.list_files(str(tmp_path / "again"))
    for name in files:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_shard_of_rejected_photos_alone(tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    manifest = write_index(index, PATHS[:3], descriptors_of([0, 1, 2]), [1], rejected={0: "broken"})
    assert manifest.shards[0].num_rows == 0
    _, found = search_index(open_index(index, manifest, tmp_path), descriptors_of([1, 2]), 5, num_threads=1)
    assert found.tolist() == [[1, 2], [2, 1]]


@given(st.integers(0, 200), st.integers(1, 30))
def test_shards_cover_every_id_once_and_evenly(num_images: int, num_shards: int) -> None:
    ranges = descriptor_shards.shard_ranges(num_images, num_shards)
    assert [shard.shard for shard in ranges] == list(range(num_shards))
    covered = [image_id for shard in ranges for image_id in range(shard.first_id, shard.stop_id)]
    assert covered == list(range(num_images))
    counts = [shard.count for shard in ranges]
    assert max(counts) - min(counts) <= 1


def flip(url: str, position: int) -> None:
    data = bytearray(storage.read_bytes(url))
    data[position] ^= 1
    storage.write_bytes(url, bytes(data))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("position", [0, 60, -1])
def test_a_flipped_byte_is_refused_by_name(directory: str, tmp_path: Path, name: str, position: int) -> None:
    manifest = small_index(directory)
    url = storage.join(directory, "shards/00001", name)
    flip(url, position)
    opened = open_index(directory, manifest, tmp_path)
    with pytest.raises(UserError) as caught:
        _ = opened.descriptors(1) if name == "descriptors.npy" else opened.shard(1)
    assert url in str(caught.value)
    assert "damaged" in str(caught.value)
    opened.shard(0)
    opened.descriptors(0)


@pytest.mark.parametrize("kind", [IndexKind.flat_8bit, IndexKind.ivf_rabitq])
def test_a_flipped_byte_of_what_shards_share(tmp_path: Path, kind: IndexKind) -> None:
    rows = np.random.default_rng(0).standard_normal((800, 8)).astype(np.float32)
    config = BuildConfig(kind=kind, num_lists=16 if kind is IndexKind.ivf_rabitq else None)
    manifest = write_index(str(tmp_path / "index"), [f"{i:03d}.jpg" for i in range(800)], rows, config=config)
    assert manifest.trained is not None
    url = str(tmp_path / "index" / manifest.trained.path)
    flip(url, 100)
    with pytest.raises(UserError, match="damaged") as caught:
        open_index(str(tmp_path / "index"), manifest, tmp_path)
    assert url in str(caught.value)


def test_a_missing_file_is_named(directory: str, tmp_path: Path) -> None:
    manifest = small_index(directory)
    url = storage.join(directory, "shards/00002/index.faiss")
    storage.remove_file(url)
    with pytest.raises(UserError, match="is missing") as caught:
        open_index(directory, manifest, tmp_path).shard(2)
    assert url in str(caught.value)


def test_a_shard_of_another_width_or_length_is_refused(tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    manifest = small_index(index)
    with pytest.raises(UserError, match=r"index\.faiss: 4 values per row, but the manifest has 8"):
        open_index(index, replace(manifest, descriptor_dim=8), tmp_path).shard(0)
    longer = replace(manifest.shards[0], num_rows=9)
    with pytest.raises(UserError, match=r"index\.faiss: 2 rows, but the manifest has 9"):
        open_index(index, replace(manifest, shards=[longer]), tmp_path).shard(0)


def test_descriptors_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    rows = descriptors_of(list(range(11)))
    rows[5, 2], rows[8, 0] = np.nan, np.inf
    with pytest.raises(UserError, match=r"shards/00001: the descriptor of image 5 is not finite \(1 of 4 are not\)"):
        write_index(str(tmp_path), PATHS, rows, [3, 7])
    assert read_manifest(str(tmp_path)) is None


def test_no_manifest_no_index(tmp_path: Path) -> None:
    assert read_manifest(str(tmp_path)) is None
    assert read_manifest(str(tmp_path / "missing")) is None
    (tmp_path / "file").touch()
    assert read_manifest(str(tmp_path / "file")) is None


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 1, 0, None, "2"])
def test_another_format_version_is_refused(directory: str, version: object) -> None:
    content = asdict(small_index(directory)) | {"format_version": version, "something_new": 3}
    storage.write_json(storage.join(directory, "manifest.json"), content)
    with pytest.raises(UserError, match=f"index format {version}; this version reads {FORMAT_VERSION}"):
        read_manifest(directory)


@pytest.mark.parametrize(
    "content",
    ["not json", "", "[]", "3", '"text"', "null", '{"format_version": 2}', '{"format_version": 2, "x": 2}'],
)
def test_a_manifest_of_something_else_is_a_users_mistake(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_manifest(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [3]},
        {"shards": None},
        {"model": []},
        {"model": {"name": "x"}},
        {"images": [{}]},
        {"trained": {"path": "x"}},
        {"removed": ["x"]},
    ],
)
def test_a_manifest_with_wrong_parts_is_a_users_mistake(tmp_path: Path, change: dict[str, object]) -> None:
    content = asdict(small_index(str(tmp_path))) | change
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json is damaged: "):
        read_manifest(str(tmp_path))


def test_an_index_of_other_weights_is_refused(tmp_path: Path) -> None:
    manifest = small_index(str(tmp_path))
    check_model(str(tmp_path), manifest, name="renamed", weights_sha256="ab" * 32)
    with pytest.raises(UserError) as caught:
        check_model(str(tmp_path), manifest, name="vitb", weights_sha256="cd" * 32)
    for part in (str(tmp_path), "small", "vitb", "abababababab", "cdcdcdcdcdcd"):
        assert part in str(caught.value)
    other = replace(manifest, model=MODEL | {"weights_sha256": "ab" * 31 + "ac"})
    with pytest.raises(UserError):
        check_model(str(tmp_path), other, name="small", weights_sha256="ab" * 32)


def test_a_generation_is_made_by_one_writer(directory: str) -> None:
    manifest = small_index(directory)
    second = replace(manifest, generation=2, num_removed=1)
    commit(directory, second)
    commit(directory, second)  # as a writer that did not hear of its success would
    with pytest.raises(UserError, match="another writer has changed the index in the meantime"):
        commit(directory, replace(second, num_removed=2))
    assert read_manifest(directory) == second


def test_of_many_writers_at_once_one_succeeds(tmp_path: Path) -> None:
    index = str(tmp_path)
    manifest = small_index(index)
    outcomes: list[int | None] = []

    def write(number: int) -> None:
        try:
            commit(index, replace(manifest, generation=2, num_removed=number))
            outcomes.append(number)
        except UserError:
            outcomes.append(None)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = [number for number in outcomes if number is not None]
    found = read_manifest(index)
    assert found is not None
    assert (len(outcomes), found.num_removed) == (16, winner)


def test_a_generation_whose_copy_was_not_made_is_found(directory: str) -> None:
    manifest = small_index(directory)
    third = replace(manifest, generation=3)
    for later in (replace(manifest, generation=2), third):
        storage.write_json(generation_url(directory, later.generation), asdict(later))
    assert read_manifest(directory) == third


def test_a_first_generation_whose_copy_was_not_made_is_found(directory: str) -> None:
    manifest = small_index(directory)
    storage.remove_file(storage.join(directory, "manifest.json"))
    assert read_manifest(directory) == manifest


@pytest.mark.parametrize("position", [40, 300, -20])
def test_a_flipped_byte_of_the_table_of_photos(directory: str, position: int) -> None:
    manifest = small_index(directory)
    url = storage.join(directory, "images.parquet")
    flip(url, position)
    with pytest.raises(UserError, match="damaged") as caught:
        read_images(directory, manifest)
    assert url in str(caught.value)


def test_images_that_do_not_fit_the_manifest_are_refused(directory: str) -> None:
    manifest = small_index(directory)
    (table,) = manifest.images
    other = image_table(directory, "images.parquet", Manifest.of("/photos", PATHS[:4]), 0)
    manifest = replace(manifest, images=[replace(other, count=table.count)])
    with pytest.raises(UserError, match=r"images\.parquet: 4 photos, but the manifest has 11"):
        read_images(directory, manifest)


def test_another_kind_from_the_same_descriptors(tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    first = small_index(index)
    draft = replace(first, generation=2)
    second = next_generation(index, draft, BuildConfig(kind=IndexKind.flat_fp16), PLENTY_BYTES, LocalRunner())
    commit(index, second)
    assert read_manifest(index) == second
    queries = descriptors_of([4, 6])
    answers = [
        search_index(open_index(index, manifest, tmp_path), queries, 4, num_threads=1) for manifest in (first, second)
    ]
    np.testing.assert_array_equal(answers[0][1], answers[1][1])


def test_a_description_continues_ids(tmp_path: Path) -> None:
    images = Manifest.of("/photos", ["x.jpg", "y.jpg", "z.jpg"])
    describe_rows(str(tmp_path), images, descriptors_of([1, 2, 3]), [1], {1: "broken"}, first_id=100)
    ids, _ = descriptor_shards.read_descriptors(str(tmp_path))
    assert ids.tolist() == [100, 102]
    assert pq.read_table(tmp_path / "images.parquet").column("image_id").to_pylist() == [100, 101, 102]
    assert pq.read_table(tmp_path / "rejected.parquet").to_pylist() == [{"path": "y.jpg", "error": "broken"}]
    entries = described_shards(str(tmp_path), "", 2, 100, 3)
    assert [(entry.first_id, entry.count) for entry in entries] == [(100, 1), (101, 2)]
    with pytest.raises(UserError, match="its shards hold 1 photos from id 100; expected 3 from id 100; delete it"):
        described_shards(str(tmp_path), "", 1, 100, 3)


def test_what_is_to_be_said_of_photos(tmp_path: Path) -> None:
    """How many can't be read, and each kind of oddity, with the first photo and where the others are."""
    images = Manifest.of("/photos", [f"{number}.jpg" for number in range(5)])
    rejected = {1: "broken: cut short", 3: "broken, too"}
    describe_rows(str(tmp_path), images, np.eye(5, 16, dtype=np.float32), [2], rejected)
    said = descriptor_shards.about_photos(str(tmp_path))
    assert said == [f"2 photos can't be read: broken: cut short (1.jpg; all in {tmp_path}/rejected.parquet)"]
    rows = [{"path": "0.jpg", "remark": "narrow: 1"}, {"path": "2.jpg", "remark": "odd"}]
    rows.append({"path": "4.jpg", "remark": "narrow: 2"})
    sealed.write_parquet(
        f"{tmp_path}/{descriptor_shards.REMARKS}", pa.Table.from_pylist(rows, descriptor_shards.REMARKS_SCHEMA)
    )
    assert descriptor_shards.about_photos(str(tmp_path)) == [
        *said,
        f"2 photos: narrow: 1 (0.jpg; all in {tmp_path}/remarks.parquet)",
        f"1 photos: odd (2.jpg; all in {tmp_path}/remarks.parquet)",
    ]
