"""Stored dense features: what comes back is what went in, by id, and no changed byte is taken for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pairvpr.config.schema import ModelConfig, Precision, StoredAs
from pairvpr.data import storage
from pairvpr.data.images import BrokenImageError
from pairvpr.errors import UserError
from pairvpr.models.weights import build_model, load_weights
from pairvpr.retrieval import dense_store
from pairvpr.retrieval.dense_store import DenseStore, Layout, as_stored, decode, encode
from pairvpr.retrieval.describe import Describer
from tests.support.flaky import FlakyFileSystem
from tests.support.small import small_model_config

FORMS = list(StoredAs)
IDS = np.array([2, 3, 5, 8, 13, 21, 34, 55], np.int64)
LARGEST_HALF = 65504.0
SIXTEEN_BITS = arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 7)))


def floats(largest: float) -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 7))
    return arrays(np.float32, shapes, elements=st.floats(-largest, largest, width=32))


def features_of(image_id: int | np.int64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Something of its own for each image: (3, 4)."""
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(int(image_id))).to(dtype)


def layout(form: StoredAs = StoredAs.half, dtype: torch.dtype = torch.float32) -> Layout:
    return Layout.of(features_of(0, dtype), form)


def fill(url: str, form: StoredAs = StoredAs.half, dtype: torch.dtype = torch.float32) -> None:
    """A whole store of `IDS`, three images in each shard."""
    shards = [IDS[first : first + 3] for first in range(0, len(IDS), 3)]
    for shard, ids in enumerate(shards):
        dense_store.write_shard(
            url, shard, ids, layout(form, dtype), (features_of(image_id, dtype) for image_id in ids)
        )
    dense_store.finish(url, shards, layout(form, dtype), {"model": "made up"})


@pytest.fixture(autouse=True)
def _store() -> Iterator[None]:
    FlakyFileSystem.reset()
    yield
    FlakyFileSystem.reset()


def test_an_image_whose_photo_could_not_be_read_says_why_and_costs_no_other(tmp_path: Path) -> None:
    lost, url = int(IDS[1]), str(tmp_path / "store")
    features = (features_of(image_id) for image_id in IDS)
    dense_store.write_shard(url, 0, IDS, layout(), features, lambda: {lost: "a.jpg: gone", 1: "of another shard"})
    dense_store.finish(url, [IDS], layout(), {"model": "made up"})
    store = DenseStore.open(url)
    with pytest.raises(BrokenImageError, match=r"^a\.jpg: gone$"):
        store.read(lost)
    for image_id in set(IDS.tolist()) - {lost}:
        torch.testing.assert_close(store.read(image_id), as_stored(features_of(image_id), StoredAs.half))


@given(bits=SIXTEEN_BITS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_sixteen_bits_come_back_bit_for_bit(bits: np.ndarray, dtype: torch.dtype) -> None:
    features = torch.from_numpy(bits.view(np.int16)).view(dtype)
    if not features.isfinite().all():
        with pytest.raises(UserError, match="not finite"):
            as_stored(features, StoredAs.half)
        return
    back = as_stored(features, StoredAs.half)
    assert back.dtype is dtype
    assert torch.equal(back.view(torch.int16), features.view(torch.int16))


@given(values=floats(LARGEST_HALF))
def test_float32_becomes_the_nearest_float16(values: np.ndarray) -> None:
    back = as_stored(torch.from_numpy(values), StoredAs.half)
    assert back.dtype is torch.float32
    assert back.numpy().tobytes() == values.astype(np.float16).astype(np.float32).tobytes()


@given(values=floats(2.0**127))
def test_eight_bits_err_by_half_a_step_of_their_own_patch(values: np.ndarray) -> None:
    back = as_stored(torch.from_numpy(values), StoredAs.int8).numpy()
    largest = np.abs(values).max(axis=1, keepdims=True).astype(np.float64)
    error = np.abs(back.astype(np.float64) - values)
    assert (error <= largest / 254 * (1 + 1e-4) + 1e-40).all()
    assert all(len(np.unique(np.abs(row))) <= 128 for row in back)


@given(values=floats(LARGEST_HALF), form=st.sampled_from(FORMS), name=st.sampled_from(list(dense_store.DTYPES)))
def test_a_record_has_its_size_and_its_meaning_by_the_layout(values: np.ndarray, form: StoredAs, name: str) -> None:
    features = torch.from_numpy(values).to(dense_store.DTYPES[name])
    if not features.isfinite().all():
        return
    of = Layout.of(features, form)
    record = encode(features, of)
    assert (
        len(record)
        == of.record_bytes
        == values.size * (1 if form is StoredAs.int8 else 2) + (4 * len(values) if form is StoredAs.int8 else 0)
    )
    back = decode(record, of)
    assert back.dtype is features.dtype
    assert torch.equal(back, as_stored(features, form))


def test_zeros_and_the_largest_value_are_exact_in_eight_bits() -> None:
    features = torch.tensor([[0.0, 0.0, 0.0], [-12.7, 12.7, 0.1], [LARGEST_HALF, 1.0, -LARGEST_HALF]])
    expected = torch.tensor([[0.0, 0.0, 0.0], [-12.7, 12.7, 0.1], [LARGEST_HALF, 0.0, -LARGEST_HALF]])
    torch.testing.assert_close(as_stored(features, StoredAs.int8), expected, rtol=1e-6, atol=1e-6)
    halves = as_stored(features.half(), StoredAs.int8)
    assert halves.dtype is torch.float16
    assert halves.isfinite().all()


@pytest.mark.parametrize("value", [LARGEST_HALF + 16, -1e30])
def test_float32_beyond_float16_is_a_users_mistake(value: float) -> None:
    with pytest.raises(UserError, match=r"beyond float16's 65504; expected rerank\.stored_as=int8"):
        as_stored(torch.tensor([[1.0, value]]), StoredAs.half)
    assert as_stored(torch.tensor([[1.0, value]]), StoredAs.int8)[0, 1] == pytest.approx(value)


@pytest.mark.parametrize(
    ("precision", "form", "record_bytes"),
    [
        (Precision.fp32, StoredAs.half, 529 * 768 * 2),
        (Precision.bf16, StoredAs.half, 529 * 768 * 2),
        (Precision.fp16, StoredAs.int8, 529 * (768 + 4)),
    ],
)
def test_the_published_network_by_hand(precision: Precision, form: StoredAs, record_bytes: int) -> None:
    of = Layout.of_model(ModelConfig(precision=precision), form)
    assert of.record_bytes == record_bytes
    assert of.values == {"half": "bfloat16" if precision == "bf16" else "float16", "int8": "int8"}[form]
    shards = dense_store.cut(np.arange(1000), of)
    assert [ids[0] for ids in shards[:2]] == [0, dense_store.SHARD_BYTES // record_bytes]
    assert np.concatenate(shards).tolist() == list(range(1000))
    assert all(len(ids) * record_bytes <= dense_store.SHARD_BYTES for ids in shards)


@pytest.mark.parametrize("precision", Precision)
def test_what_a_network_gives_has_the_layout_of_its_model(precision: Precision) -> None:
    config = replace(small_model_config(), precision=precision)
    describer = Describer(build_model(config, load_weights(config), torch.device("cpu")))
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8)
    features = describer.embedded(pixels)
    for form in FORMS:
        assert Layout.of(features, form) == Layout.of_model(config, form)
    is_exact = torch.equal(as_stored(features, StoredAs.half), features)
    assert is_exact is (precision is not Precision.fp32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", dense_store.DTYPES.values(), ids=str)
@pytest.mark.parametrize("where", ["local", "flaky://bucket/store"])
def test_every_image_is_found_by_its_id(tmp_path: Path, form: StoredAs, dtype: torch.dtype, where: str) -> None:
    url = str(tmp_path) if where == "local" else where
    fill(url, form, dtype)
    store = DenseStore.open(url)
    for image_id in reversed(IDS.tolist()):
        found = store.read(image_id)
        assert found.dtype is dtype
        assert torch.equal(found, as_stored(features_of(image_id, dtype), form))
    assert store.missing(np.array([1, 2, 21, 22, 55, 56])).tolist() == [1, 22, 56]
    for image_id in (0, 4, 9, 22, 56):
        with pytest.raises(UserError, match=rf"has no image {image_id};"):
            store.read(image_id)
    assert store.manifest.settings == {"model": "made up"}


def test_reading_an_image_reads_its_own_bytes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path))
    store, ranges = DenseStore.open(str(tmp_path)), []
    store.check()
    plain = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", lambda url, asked: ranges.append((url, *asked)) or plain(url, asked))
    monkeypatch.setattr(storage, "read_bytes", lambda url: pytest.fail(f"{url} was read whole"))
    store.read(13)
    offset = len(layout().head(3))
    assert ranges == [(f"{tmp_path}/shards/00001/records.npy", (offset + 24, offset + 48))]


@pytest.mark.parametrize("form", FORMS)
def test_numpy_reads_the_files_as_the_page_on_formats_says(tmp_path: Path, form: StoredAs) -> None:
    for dtype in dense_store.DTYPES.values():
        fill(f"{tmp_path}/{dtype}", form, dtype)
        folder = tmp_path / str(dtype) / "shards" / "00001"
        records = np.load(folder / "records.npy", mmap_mode="r")
        assert np.load(folder / "ids.npy").tolist() == [8, 13, 21]
        if form is StoredAs.int8:
            values = records["values"][1].astype(np.float32) * records["scales"][1][:, None]
            expected = features_of(13, dtype).float().numpy()
            assert np.abs(values - expected).max() <= np.abs(expected).max() / 254 * 1.01
        elif dtype is torch.bfloat16:
            values = (records[1].astype(np.uint32) << 16).view(np.float32)
            assert (values == features_of(13, dtype).float().numpy()).all()
        else:
            assert records.dtype == np.float16
            assert (records[1] == features_of(13, dtype).half().numpy()).all()


def positions(size: int) -> list[int]:
    """First and last bytes, and some between."""
    return sorted({0, 1, 9, 64, 127, 128, 130, size // 2, size // 3, size - 2, size - 1} & set(range(size)))


@pytest.mark.parametrize("name", ["ids.npy", "records.npy", "crc32.npy", "shard.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "gone"])
def test_a_changed_file_of_a_shard_is_refused_by_its_name(tmp_path: Path, name: str, damage: str) -> None:
    fill(f"{tmp_path}/whole")
    victim = tmp_path / "store" / "shards" / "00001" / name
    whole = (tmp_path / "whole" / "shards" / "00001" / name).read_bytes()
    damaged: list[bytes | None] = {
        "flip": [whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :] for at in positions(len(whole))],
        "cut": [whole[:-1], whole[: len(whole) // 2], b""],
        "longer": [whole + b"\n"],
        "gone": [None],
    }[damage]
    for data in damaged:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "store")
        victim.unlink() if data is None else victim.write_bytes(data)
        store = DenseStore.open(f"{tmp_path}/store")
        with pytest.raises(UserError) as caught:
            _read(store, IDS[3:6])
        assert str(victim) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert torch.equal(store.read(2), as_stored(features_of(2), StoredAs.half))  # of another shard
        if name != "records.npy" or damage != "flip":
            with pytest.raises(UserError, match="shards/00001"):
                store.check()


@pytest.mark.slow
def test_any_flipped_bit_of_a_shard_or_of_the_manifest_is_refused(tmp_path: Path) -> None:
    fill(str(tmp_path), StoredAs.int8)
    for file in [tmp_path / "manifest.json", *(tmp_path / "shards" / "00002").iterdir()]:
        whole = file.read_bytes()
        for at in range(0, len(whole), 1 if len(whole) < 600 else 3):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
            with pytest.raises(UserError, match=file.name):
                _read_all(tmp_path)
        file.write_bytes(whole)
    _read_all(tmp_path)


def _read_all(directory: Path) -> None:
    _read(DenseStore.open(str(directory)), IDS)


def _read(store: DenseStore, ids: np.ndarray) -> None:
    for image_id in ids.tolist():
        store.read(image_id)


@pytest.mark.parametrize("file", ["manifest.json", "shards/00000/shard.json"])
def test_a_later_format_is_refused(tmp_path: Path, file: str) -> None:
    fill(str(tmp_path))
    content = json.loads((tmp_path / file).read_text())
    (tmp_path / file).write_text(json.dumps(content | {"format_version": 2, "news": 1}))
    expected = (
        f"{tmp_path}/{file}: dense features stored in format 2; this version reads format 1, a newer one reads it"
    )
    readers = {
        "manifest.json": lambda: DenseStore.open(str(tmp_path)),
        "shards/00000/shard.json": lambda: dense_store.read_row(str(tmp_path), 0, IDS[:3], layout()),
    }
    with pytest.raises(UserError) as caught:
        readers[file]()
    assert str(caught.value) == expected


def test_what_is_no_finished_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished store of dense features there"):
        DenseStore.open(f"{tmp_path}/nowhere")
    dense_store.write_shard(str(tmp_path), 0, IDS, layout(), map(features_of, IDS))
    with pytest.raises(UserError, match="no finished store of dense features there"):
        DenseStore.open(str(tmp_path))


def test_a_shard_is_finished_only_for_its_own_images_and_layout(tmp_path: Path) -> None:
    url = str(tmp_path)
    assert dense_store.read_row(url, 0, IDS[:3], layout()) is None
    dense_store.write_shard(url, 0, IDS[:3], layout(), map(features_of, IDS[:3]))
    row = dense_store.read_row(url, 0, IDS[:3], layout())
    assert row is not None
    assert (row.first_id, row.last_id, row.count) == (2, 5, 3)
    for ids, of in ((IDS[1:4], layout()), (IDS[:3], layout(StoredAs.int8)), (IDS[:3], layout(dtype=torch.float16))):
        with pytest.raises(UserError, match=r"shards/00000/shard\.json: this shard has other images or another layout"):
            dense_store.read_row(url, 0, ids, of)


def test_a_late_attempt_on_another_kind_of_gpu_leaves_the_finished_shard_as_it_is(tmp_path: Path) -> None:
    url, late = str(tmp_path), iter(IDS.tolist())

    def rounded_otherwise() -> Iterator[Tensor]:
        yield features_of(next(late))
        dense_store.write_shard(url, 0, IDS, layout(), map(features_of, IDS))  # the other attempt is faster
        yield from (features_of(image_id) * 1.5 for image_id in late)

    dense_store.write_shard(url, 0, IDS, layout(), rounded_otherwise())
    dense_store.finish(url, [IDS], layout(), {"model": "made up"})
    store = DenseStore.open(url)
    for image_id in IDS.tolist():
        assert torch.equal(store.read(image_id), features_of(image_id).half().float())
    assert not [name for name in storage.list_files(url) if "tmp" in name]


def test_features_that_can_not_be_stored_leave_no_shard_and_name_the_image(tmp_path: Path) -> None:
    def one_is_large(image_id: int) -> Tensor:
        return features_of(image_id) * (1e9 if image_id == 5 else 1)

    with pytest.raises(UserError, match=r"^image 5: dense features reach .* beyond float16"):
        dense_store.write_shard(str(tmp_path), 0, IDS, layout(), map(one_is_large, IDS))
    assert storage.list_files(str(tmp_path)) == []


@pytest.mark.parametrize("order", [reversed, list])
def test_the_same_images_give_the_same_bytes_whoever_wrote_when(
    tmp_path: Path, order: Callable[[list[int]], Iterator[int]]
) -> None:
    fill(f"{tmp_path}/one")
    shards = [IDS[first : first + 3] for first in range(0, len(IDS), 3)]
    for shard in [*order(list(range(3))), 1]:  # one of them twice
        dense_store.write_shard(f"{tmp_path}/two", shard, shards[shard], layout(), map(features_of, shards[shard]))
    dense_store.finish(f"{tmp_path}/two", shards, layout(), {"model": "made up"})
    one, two = (
        {name: storage.sha256(f"{tmp_path}/{which}/{name}") for name in storage.list_files(f"{tmp_path}/{which}")}
        for which in ("one", "two")
    )
    assert len(one) == 3 * 4 + 1
    assert one == two
