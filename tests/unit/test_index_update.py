"""Photos that come and go: an updated index finds what one built afresh finds, path by path."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.config.schema import BuildConfig, IndexKind
from pairvpr.data import storage
from pairvpr.data.manifest import Manifest
from pairvpr.index.generations import ImageTable, IndexManifest, StoredFile, commit, read_images, read_manifest
from pairvpr.index.make import LocalRunner
from pairvpr.index.merge import Found
from pairvpr.index.reader import removed_ids, search_index
from pairvpr.index.update import compacted, remove_leftovers, with_added, without
from pairvpr.index.versions import are_there, photo_versions, write_versions
from tests.support.index import describe_rows, opened, write_index

Rows = NDArray[np.float32]
HERE = LocalRunner()


@dataclass(frozen=True)
class Change:
    """Photos (numbers that name paths) that are added, with the content they have from now on, and removed."""

    added: dict[int, int]
    removed: list[int]
    compact: bool


def descriptor(content: int) -> Rows:
    """Whole numbers, of which many photos share some."""
    return np.array([content % 3, content % 5, content // 7 % 2], np.float32)


def path_of(photo: int) -> str:
    return f"{photo:03d}.jpg"


@st.composite
def changes(draw: st.DrawFn) -> Change:
    photos = st.integers(0, 30)
    added = draw(st.dictionaries(photos, st.integers(0, 40), max_size=8))
    removed = draw(st.lists(photos, max_size=8, unique=True))
    return Change(added, [photo for photo in removed if photo not in added], draw(st.booleans()))


def live_ids(directory: str, manifest: IndexManifest) -> dict[str, int]:
    images = read_images(directory, manifest)
    gone = set(removed_ids(directory, manifest).tolist())
    return {path: image_id for image_id, path in enumerate(images.paths) if image_id not in gone}


def apply(directory: str, manifest: IndexManifest, change: Change, num_shards: int) -> IndexManifest:
    """The next generation, as the job `update_index` makes it."""
    draft = replace(manifest, generation=manifest.generation + 1)
    prefix = f"updates/{draft.generation:06d}/"
    live = live_ids(directory, manifest)
    paths = sorted(path_of(photo) for photo in change.added)
    gone = sorted(live[path] for path in {*paths, *map(path_of, change.removed)} if path in live)
    if paths:
        rows = np.stack([descriptor(change.added[photo]) for photo in sorted(change.added)])
        cuts = [len(paths) // num_shards * number for number in range(1, num_shards)]
        below = storage.join(directory, prefix.rstrip("/"))
        added = Manifest.of("/photos", paths)
        num_shards = describe_rows(below, added, rows, cuts, first_id=draft.num_images)
        draft = with_added(directory, draft, prefix, added, num_shards, 1, HERE)
    if gone:
        draft = without(directory, draft, prefix, np.array(gone))
    if change.compact:
        draft = compacted(directory, draft, prefix, 0.2, 1, HERE)
    commit(directory, draft)
    return draft


def by_path(directory: str, manifest: IndexManifest, queries: Rows, k: int) -> list[list[tuple[float, str]]]:
    """Distances and paths of each query's k nearest; those that tie, in the order of paths."""
    paths = read_images(directory, manifest).paths
    num_live = manifest.num_live
    found: Found = search_index(opened(directory, manifest), queries, max(num_live, 1), num_threads=1)
    lines = [
        sorted((float(distance), paths[image_id]) for distance, image_id in zip(*line, strict=True))
        for line in zip(*found, strict=True)
    ]
    return [line[:k] for line in lines]


@pytest.mark.slow
@settings(max_examples=60)
@given(
    st.dictionaries(st.integers(0, 30), st.integers(0, 40), min_size=3, max_size=20),
    st.lists(changes(), min_size=1, max_size=4),
    st.sampled_from([IndexKind.flat, IndexKind.flat_fp16]),
    st.integers(1, 3),
)
def test_an_updated_index_equals_one_built_afresh(
    first: dict[int, int], following: list[Change], kind: IndexKind, num_shards: int
) -> None:
    queries = np.random.default_rng(0).integers(0, 5, (10, 3)).astype(np.float32)
    config, content = BuildConfig(kind=kind), dict(first)
    with tempfile.TemporaryDirectory() as folder:
        rows = np.stack([descriptor(first[photo]) for photo in sorted(first)])
        manifest = write_index(f"{folder}/index", [path_of(photo) for photo in sorted(first)], rows, config=config)
        generations = [(manifest, by_path(f"{folder}/index", manifest, queries, 8))]
        for number, change in enumerate(following):
            manifest = apply(f"{folder}/index", manifest, change, num_shards)
            content = {photo: row for photo, row in (content | change.added).items() if photo not in change.removed}
            assert read_manifest(f"{folder}/index") == manifest
            assert manifest.num_live == len(content)
            assert set(live_ids(f"{folder}/index", manifest)) == set(map(path_of, content))
            answers = by_path(f"{folder}/index", manifest, queries, 8)
            generations.append((manifest, answers))
            if not content:
                assert answers == [[]] * 10
                continue
            rows = np.stack([descriptor(content[photo]) for photo in sorted(content)])
            fresh_folder = f"{folder}/fresh{number}"
            fresh = write_index(fresh_folder, [path_of(photo) for photo in sorted(content)], rows, config=config)
            assert answers == by_path(fresh_folder, fresh, queries, 8)
        for earlier, answers in generations:  # readers keep the generation that they opened
            assert by_path(f"{folder}/index", earlier, queries, 8) == answers


@pytest.mark.parametrize("kind", [IndexKind.ivf_8bit, IndexKind.ivf_rabitq])
def test_an_approximate_index_learns_nothing_new_and_finds_what_is_new(tmp_path: object, kind: IndexKind) -> None:
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((1500, 16)).astype(np.float32)
    config = BuildConfig(kind=kind, num_lists=16)
    index = f"{tmp_path}/index"
    manifest = write_index(index, [f"a{i:04d}.jpg" for i in range(1000)], rows[:1000], [400], config=config)
    draft = replace(manifest, generation=2)
    images = Manifest.of("/photos", [f"b{i:04d}.jpg" for i in range(500)])
    describe_rows(f"{index}/updates/2", images, rows[1000:], [100], first_id=1000)
    draft = with_added(index, draft, "updates/2/", images, 2, 1, HERE)
    draft = without(index, draft, "updates/2/", np.arange(0, 400, 2))
    draft = compacted(index, draft, "updates/2/", 0.3, 1, HERE)
    commit(index, draft)
    assert draft.trained == manifest.trained
    assert [entry.num_rows for entry in draft.shards] == [200, 600, 100, 400]
    assert [entry.num_removed for entry in draft.shards] == [0, 0, 0, 0]
    live = np.setdiff1d(np.arange(1500), np.arange(0, 400, 2))
    _, found = search_index(opened(index, draft), rows, 1, num_threads=1)
    assert (found[live, 0] == live).mean() > 0.99
    assert not np.isin(found, np.arange(0, 400, 2)).any()


def test_nothing_of_an_earlier_generation_is_touched(tmp_path: object) -> None:
    index = f"{tmp_path}/index"
    manifest = write_index(index, [path_of(photo) for photo in range(10)], np.eye(10, dtype=np.float32), [5])
    before = {name: storage.sha256(f"{index}/{name}") for name in storage.list_files(index) if name != "manifest.json"}
    draft = without(index, replace(manifest, generation=2), "updates/2/", np.array([1, 2, 3]))
    commit(index, compacted(index, draft, "updates/2/", 0.2, 1, HERE))
    assert all(storage.sha256(f"{index}/{name}") == digest for name, digest in before.items())
    written = set(storage.list_files(index)) - before.keys() - {"manifest.json"}
    assert {name.split("/")[0] for name in written} == {"updates", "generations"}
    assert not any("00001/" in name for name in written)  # the shard that lost nothing is not written anew


def test_photos_that_an_update_added_are_known_as_they_were(tmp_path: Path) -> None:
    """Until one is replaced, moved to another place, or removed; those that the index was built from are not."""
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg"):
        (tmp_path / name).write_bytes(name.encode())
    photos = Manifest.of(str(tmp_path), ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]).with_positions(np.zeros((4, 2)))
    below = "updates/000002-x"
    file = StoredFile(path=f"{below}/images.parquet", bytes=0, sha256="0" * 64)
    built = replace(write_index(str(tmp_path / "index"), list("vwxyz"), np.eye(5, 16, dtype=np.float32)), generation=2)
    tables = [*built.images, ImageTable(file=file, first_id=5, count=4)]
    manifest, nothing = replace(built, num_images=9, images=tables), np.empty(0, np.int64)

    def there(removed: NDArray[np.int64] = nothing, photos: Manifest = photos) -> list[bool]:
        return are_there(str(tmp_path), manifest, removed, photos, photo_versions(photos)).tolist()

    assert there() == [False] * 4
    write_versions(str(tmp_path / below), photos, photo_versions(photos))
    assert there() == [True] * 4
    assert there(removed=np.array([6])) == [True, False, True, True]
    (tmp_path / "c.jpg").write_bytes(b"another photo")
    assert there() == [True, True, False, True]
    moved = np.zeros((4, 2))
    moved[3] = 1.0
    assert there(photos=photos.with_positions(moved)) == [True, True, False, False]


def test_leftovers_are_those_that_can_not_become_a_generation(tmp_path: Path) -> None:
    index = str(tmp_path)
    first = write_index(index, list("vwxyz"), np.eye(5, 16, dtype=np.float32))
    second = without(index, replace(first, generation=2), "updates/000002-mine/", np.array([1]))
    for folder in ("000002-late", "000003-at-work", "notes"):
        storage.write_bytes(f"{index}/updates/{folder}/file", b"")
    remove_leftovers(index, first)
    assert len(storage.list_files(f"{index}/updates")) == 4
    commit(index, second)
    remove_leftovers(index, second)
    assert storage.list_files(f"{index}/updates") == ["000002-mine/removed.npy", "000003-at-work/file", "notes/file"]
