"""Parts cut a manifest, shards gather them, and every photo is in a shard once."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ray.util.metrics import Counter

from pairvpr.config.schema import ModelConfig
from pairvpr.data import images
from pairvpr.data.manifest import Manifest
from pairvpr.data.photo_batches import PhotoBatch
from pairvpr.distributed import parts as parts_module
from pairvpr.distributed.metrics import count_bytes
from pairvpr.distributed.metrics import counted as counted_for
from pairvpr.distributed.parts import MAX_BATCHES_PER_PART, Parts, commit_shard, decode, write
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.index import descriptor_shards


@given(
    num_images=st.integers(1, 5000),
    batch_size=st.integers(1, 64),
    size_px=st.sampled_from([14, 224, 322, 5000]),
    num_shards=st.integers(1, 9),
)
def test_parts_hold_every_photo_once_in_whole_batches(
    num_images: int, batch_size: int, size_px: int, num_shards: int
) -> None:
    parts = Parts.of("somewhere", num_images, batch_size, size_px)
    assert [i for part in range(len(parts)) for i in parts.ids(part)] == list(range(num_images))
    assert all(parts.ids(part).start % batch_size == 0 for part in range(len(parts)))
    assert parts.photos_per_part <= MAX_BATCHES_PER_PART * batch_size
    names = [parts.name(part) for part in range(len(parts))]
    assert names == sorted(set(names))
    for shard in descriptor_shards.shard_ranges(num_images, num_shards):
        touching = [
            part for part in range(len(parts)) if set(parts.ids(part)) & set(range(shard.first_id, shard.stop_id))
        ]
        assert list(parts.of_shard(shard)) == touching


def test_large_descriptions_have_fewer_files_than_batches() -> None:
    assert len(Parts.of("somewhere", 2_805_840, 16, 322)) == -(-2_805_840 // (16 * 6))  # 32 MiB of pixels


@pytest.mark.parametrize("num_shards", [1, 3, 4])
def test_shards_gather_their_rows_from_parts_on_both_borders(tmp_path: Path, num_shards: int) -> None:
    num_images, broken = 23, {0: "first", 9: "amid", 22: "last"}
    descriptors = np.random.default_rng(0).normal(size=(num_images, 4)).astype(np.float32)
    parts = Parts(str(tmp_path / "parts"), num_images, 5)
    for part in range(len(parts)):
        ids = parts.ids(part)
        pixels = np.zeros((len(ids), 2, 2, 3), np.uint8)
        errors = {i - ids.start: text for i, text in broken.items() if i in ids}
        write(parts.url(part), PhotoBatch(ids.start, pixels, errors), descriptors[ids.start : ids.stop], 1.0)
    shards = descriptor_shards.shard_ranges(num_images, num_shards)
    for shard in shards:
        commit_shard(str(tmp_path), shard, [parts.url(part) for part in parts.of_shard(shard)], 4, 0)
    about = [descriptor_shards.read_shard_description(str(tmp_path), shard.shard) for shard in shards]
    rejected = {i: text for shard in about if shard is not None for i, text in shard.rejected.items()}
    assert rejected == broken
    assert sum(shard.seconds for shard in about if shard is not None) == len(parts)  # a part on a border counts once
    kept = [i for i in range(num_images) if i not in broken]
    found = [np.load(tmp_path / "shards" / f"{shard.shard:05d}" / "ids.npy") for shard in shards]
    rows = [np.load(tmp_path / "shards" / f"{shard.shard:05d}" / "descriptors.npy") for shard in shards]
    assert np.concatenate(found).tolist() == kept
    np.testing.assert_array_equal(np.concatenate(rows), descriptors[kept])


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    parts = Parts(str(tmp_path / "parts"), 10, 5)
    write(parts.url(0), PhotoBatch(0, np.zeros((5, 2, 2, 3), np.uint8), {}), np.ones((5, 4), np.float32), 1.0)
    with pytest.raises(AssertionError, match="missing or double"):
        commit_shard(str(tmp_path), descriptor_shards.shard_ranges(10, 1)[0], [parts.url(0)], 4, 0)


def test_a_folder_that_this_node_does_not_see_rejects_no_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get", lambda manifest: manifest)
    folder = tmp_path / "photos"

    def decoded(root: str) -> list[Any]:
        manifest = cast(Any, Manifest.of(root, ["a.jpg", "b.jpg"]))
        return decode(
            {"part": [0]}, manifest=manifest, photos_per_part=2, settings=ModelConfig(image_size_px=14), step="describe"
        )["errors"]

    for _ in ("missing", "a mount point without its mount"):
        with pytest.raises(UserError, match=rf"{folder}: .*{socket.gethostname()}; expected a folder that every node"):
            decoded(str(folder))
        folder.mkdir(exist_ok=True)
    (folder / "another.jpg").touch()
    assert decoded(str(folder))[0].count("FileNotFoundError") == 2
    failures: list[tuple[str, str, int]] = []
    monkeypatch.setattr(parts_module, "count_failure", lambda *what: failures.append(what))
    assert decoded("memory://nowhere")[0].count("FileNotFoundError") == 2
    assert failures == [("describe", "photo", 2)]


def test_bytes_count_for_the_step_of_the_task_also_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process does a task of another step next."""
    counted: list[tuple[str, str, float]] = []

    def inc(counter: Counter, value: float, tags: dict[str, str]) -> None:
        counted.append((counter.info["name"].removeprefix("pairvpr_"), tags["step"], value))

    monkeypatch.setattr(Counter, "inc", inc)
    monkeypatch.setattr(ray, "get", lambda manifest: manifest)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.jpg").write_bytes(b"no photo")
    parts, shard = Parts(str(tmp_path / "parts"), 5, 5), descriptor_shards.shard_ranges(5, 1)[0]
    write(parts.url(0), PhotoBatch(0, np.zeros((5, 2, 2, 3), np.uint8), {}), np.ones((5, 4), np.float32), 1.0)
    count_bytes("before")

    def of(task: Callable[[], object]) -> set[tuple[str, str]]:
        counted.clear()
        with suppress(UserError, IncompleteRunError):
            task()
        assert all(value > 0 for *_, value in counted)
        found = {(what, step) for what, step, _ in counted}
        counted.clear()
        count_bytes("the next step")
        assert not counted
        return found

    commit = counted_for(commit_shard, "describe")
    read, written = ("read_bytes", "describe"), ("written_bytes", "describe")
    assert of(lambda: commit(str(tmp_path), shard, [parts.url(0)], 4, 0)) == {read, written}
    Path(parts.url(0)).write_bytes(b"damaged")
    assert of(lambda: commit(str(tmp_path), shard, [parts.url(0)], 4, 0)) == {read}

    def decode_and_miss_the_folder() -> None:
        manifest = cast(Any, Manifest.of(str(tmp_path / "photos"), ["0.jpg"]))
        monkeypatch.setattr(parts_module, "check_photos_are_seen", not_seen)
        settings = ModelConfig(image_size_px=14)
        decode({"part": [0]}, manifest=manifest, photos_per_part=1, settings=settings, step="describe")

    def not_seen(_: Manifest) -> None:
        raise UserError("not seen")

    assert of(decode_and_miss_the_folder) == {read}


@pytest.mark.parametrize("scaled_decoding", [False, True])
def test_a_part_is_decoded_as_on_one_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scaled_decoding: bool
) -> None:
    monkeypatch.setattr(ray, "get", lambda manifest: manifest)
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (60, 90, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{number}.jpg")
    manifest = Manifest.of(str(tmp_path), [f"{number}.jpg" for number in range(3)])
    rows = decode(
        {"part": [0, 1]},
        manifest=cast(Any, manifest),
        photos_per_part=2,
        settings=ModelConfig(image_size_px=14, scaled_decoding=scaled_decoding),
        step="describe",
    )
    expected = [images.load(manifest.url(i), 14, scaled_decoding=scaled_decoding) for i in range(3)]
    assert b"".join(rows["pixels"]) == np.stack(expected).tobytes()
    assert np.array_equal(expected[0], images.load(manifest.url(0), 14)) == (not scaled_decoding)


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "flipped"])
def test_a_damaged_part_is_deleted_and_named(tmp_path: Path, damage: str) -> None:
    parts = Parts(str(tmp_path / "parts"), 5, 5)
    write(parts.url(0), PhotoBatch(0, np.zeros((5, 2, 2, 3), np.uint8), {}), np.ones((5, 4), np.float32), 1.0)
    file = Path(parts.url(0))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    content = {"truncated": data[: len(data) // 2], "empty": b"", "foreign": b"not an archive", "flipped": data}
    file.write_bytes(content[damage])
    with pytest.raises(IncompleteRunError, match=rf"^{file} was damaged .* was deleted; run the same command again"):
        commit_shard(str(tmp_path), descriptor_shards.shard_ranges(5, 1)[0], [parts.url(0)], 4, 0)
    assert not file.exists()
