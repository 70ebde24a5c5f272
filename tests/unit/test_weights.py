"""Weights: the same tensors from every kind of file, every key checked, and nothing of a file executed."""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from pairvpr.config.schema import ModelConfig
from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.models import weights
from pairvpr.models.pair_vpr import PairVPR
from pairvpr.models.weights_file import find_weights_file, read_state_dict
from tests.support.small import small_model_config

REPOSITORY = Path(__file__).parents[2]
DIGEST_IN_ANOTHER_PROCESS = """
from pairvpr.models.weights import load_weights
from tests.support.small import small_model_config
print(load_weights(small_model_config()).sha256)
"""


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """A state dict of the small network in which no tensor is constant."""
    generator = torch.Generator().manual_seed(5)
    with torch.device("meta"):
        expected = PairVPR(small_model_config()).state_dict()
    return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in expected.items()}


def saved(content: object, **options: Any) -> bytes:
    sink = io.BytesIO()
    torch.save(content, sink, **options)
    return sink.getvalue()


def refusal(path: Path, config: ModelConfig | None = None) -> str:
    with pytest.raises(UserError) as caught:
        weights.load_weights(config or small_model_config(str(path)))
    message = str(caught.value)
    assert message.startswith(f"model.weights={path}")
    assert "\n" not in message
    return message


def assert_same(loaded: weights.Weights, state: Mapping[str, Tensor]) -> None:
    assert loaded.arrays.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded.arrays[name].dtype == np.float32
        np.testing.assert_array_equal(loaded.arrays[name], tensor.float().numpy())
    assert not loaded.untrained


@pytest.mark.parametrize("kind", ["bare", "under model", "parameters", "legacy", "stage-one file", "safetensors"])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, state: dict[str, Tensor], kind: str) -> None:
    namespace = argparse.Namespace(lr=3e-4, data="/data", sizes=[1, 2], resume=None)
    data = {
        "bare": lambda: saved(state),
        "under model": lambda: saved({"model": state, "epoch": 3}),
        "parameters": lambda: saved({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}),
        "legacy": lambda: saved(state, _use_new_zipfile_serialization=False),
        "stage-one file": lambda: saved(
            {"model": state, "optimizer": {"state": {0: {"step": 1}}}, "scaler": {}, "epoch": 1, "args": namespace}
        ),
        "safetensors": lambda: safetensors.torch.save(state),
    }[kind]()
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    path.write_bytes(data)
    loaded = weights.load_weights(small_model_config(str(path)))
    assert_same(loaded, state)
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_become_float32(tmp_path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    path = tmp_path / "w.safetensors"
    narrow = {name: tensor.to(dtype) for name, tensor in state.items()}
    path.write_bytes(safetensors.torch.save(narrow))
    assert_same(weights.load_weights(small_model_config(str(path))), narrow)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_url(state: dict[str, Tensor], suffix: str) -> None:
    url = f"memory://{uuid4().hex}/w{suffix}"
    data = saved(state) if suffix == ".pth" else safetensors.torch.save(state)
    storage.write_bytes(url, data)
    loaded = weights.load_weights(small_model_config(url))
    storage.remove_file(url)
    assert_same(loaded, state)
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()


class _Code:
    """What an attacker puts into a pickle: loading it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "w.bin"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_refused_and_not_run(
    tmp_path: Path, state: dict[str, Tensor], name: str, zipped: bool
) -> None:
    marker, path = tmp_path / "it_ran", tmp_path / name
    path.write_bytes(saved({"model": state, "args": _Code(marker)}, _use_new_zipfile_serialization=zipped))
    message = refusal(path)
    assert not marker.exists()
    assert "refused: it contains more than tensors (a pickle can run code)" in message
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert marker.exists()  # the file was a real one


def test_no_other_class_than_namespace_is_let_in(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved({"model": state, "args": Path("/somewhere")}))
    assert "refused" in refusal(path)


def test_all_misfits_are_named_at_once(tmp_path: Path, state: dict[str, Tensor]) -> None:
    wrong = {f"net.{name}" if name == "mask_token" else name: tensor for name, tensor in state.items()}
    del wrong["globalizer.0.bias"]
    wrong["dec_norm.weight"] = torch.zeros(31)
    wrong["decoder_embed.weight"] = torch.zeros(32, 16)
    wrong["extra"] = torch.zeros(1)
    path = tmp_path / "w.pth"
    path.write_bytes(saved(wrong))
    assert refusal(path) == (
        f"model.weights={path} does not fit the network; 2 missing: globalizer.0.bias, mask_token; "
        "2 unexpected: extra, net.mask_token; "
        "2 mis-shaped: dec_norm.weight 31 instead of 32, decoder_embed.weight 32x16 instead of 32x32"
    )


@pytest.mark.parametrize("content", [[1, 2], torch.zeros(3), {"a": 1}, {"model": 3}, {"model": {"a": "text"}}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved(content))
    assert "expected a state dict, or a dict with one under 'model'" in refusal(path)


def test_many_misfits_are_counted_and_the_first_named(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved({"mask_token": state["mask_token"].long()}))
    message = refusal(path)
    assert f"{len(state) - 1} missing: " in message
    assert message.endswith(", ...; 1 not in floats of 16 to 64 bits: mask_token torch.int64")
    assert len(message) < 500


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, state: dict[str, Tensor], value: float) -> None:
    broken = state | {"mask_token": state["mask_token"].double().clone()}
    broken["mask_token"].view(-1)[3] = value
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors.torch.save(broken))
    assert refusal(path).endswith(
        f"NaN or infinite values in 1 of {len(state)} tensors: mask_token; expected finite float32 values"
    )


@pytest.mark.parametrize(
    ("rename", "found"),
    [
        ("module.{}", "'module.'"),
        ("_orig_mod.{}", "'_orig_mod.'"),
        ("module._orig_mod.{}", "'module.' and '_orig_mod.'"),
        ("_orig_mod.module.{}", "'module.' and '_orig_mod.'"),
    ],
)
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_names_of_wrappers_are_taken_off_and_said(
    tmp_path: Path,
    state: dict[str, Tensor],
    rename: str,
    found: str,
    wrapper: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    renamed = {rename.format(name): tensor for name, tensor in state.items()}
    path = tmp_path / "w.pth"
    path.write_bytes(saved(renamed if wrapper is None else {wrapper: renamed, "epoch": 3}))
    assert_same(weights.load_weights(small_model_config(str(path))), state)
    said = f"model.weights={path}: {found} taken off the names of {len(state)} of {len(state)} tensors\n"
    assert capsys.readouterr().err == said


def test_a_wrapped_part_is_unwrapped(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved({name.replace("encoder.", "encoder._orig_mod."): value for name, value in state.items()}))
    assert_same(weights.load_weights(small_model_config(str(path))), state)


def test_nothing_is_taken_off_where_two_names_would_become_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved(state | {"module.mask_token": torch.zeros_like(state["mask_token"])}))
    assert "1 unexpected: module.mask_token" in refusal(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: tensor.to_sparse(),
        lambda tensor: tensor.to("meta"),
        lambda tensor: torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8),
        lambda tensor: torch.nested.nested_tensor([tensor]),
    ],
    ids=["sparse", "meta", "quantized", "nested"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_of_unusual_kinds_are_refused(tmp_path: Path, state: dict[str, Tensor], make: Any) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved(state | {"mask_token": make(state["mask_token"])}))
    assert re.search(r"mask_token.* not a plain tensor|refused|not a complete", refusal(path))


def test_two_state_dicts_in_a_file_are_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved({"model": state, "state_dict": state}))
    assert "it holds a dict under 'model' and under 'state_dict'" in refusal(path)


def rezipped(data: bytes, compression: int, extra: Mapping[str, bytes] | None = None) -> bytes:
    """A file of torch.save as another program packs it."""
    sink = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(sink, "w", compression) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
        for name, content in (extra or {}).items():
            target.writestr(name, content)
    return sink.getvalue()


def test_compressed_archives_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pth"
    path.write_bytes(rezipped(saved({"a": torch.zeros(1)}), zipfile.ZIP_DEFLATED, {"archive/data/1": bytes(1 << 26)}))
    assert path.stat().st_size < 1 << 20
    assert "a compressed archive" in refusal(path)


def test_a_header_that_says_it_is_huge_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes((1 << 60).to_bytes(8, "little") + b'{"a":' + bytes(100))
    assert "not a complete .safetensors file" in refusal(path)


def damaged_copy(whole: bytes, random: np.random.Generator) -> bytes:
    """One of the ways in which disks, networks and people damage files."""
    content = bytearray(whole)
    at = int(random.integers(len(content)))
    match random.integers(5):
        case 0:
            content[at] ^= 1 << int(random.integers(8))
        case 1:
            for place in random.integers(len(content), size=int(random.integers(1, 9))):
                content[place] = int(random.integers(256))
        case 2:
            del content[at:]
        case 3:
            content[at : at + int(random.integers(1, 600))] = random.bytes(int(random.integers(600)))
        case _:
            source, size = int(random.integers(len(content))), int(random.integers(1, 600))
            content[at : at + size] = content[source : source + size]
    return bytes(content)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("num_files", [240, pytest.param(6_000, marks=pytest.mark.soak)])
def test_damaged_files_are_refused_or_give_what_the_whole_one_gives(
    tmp_path: Path, num_files: int, record_property: Callable[[str, object], None]
) -> None:
    """But for numbers in .safetensors and .pth before torch 1.6, which have no checksum: their sha256 differs."""
    state = {f"layer.{n}.weight": torch.arange(40.0).reshape(5, 8) + n for n in range(6)}
    wholes = {
        "zip": saved(state),
        "legacy": saved({"model": state, "args": argparse.Namespace(lr=1.0)}, _use_new_zipfile_serialization=False),
        "safetensors": safetensors.torch.save(state),
    }
    random = np.random.default_rng(11)
    counts, longest = Counter[str](), 0
    path = tmp_path / "w"
    for number in range(num_files):
        kind = list(wholes)[number % len(wholes)]
        data = damaged_copy(wholes[kind], random)
        path.write_bytes(data)
        started = time.monotonic()
        try:
            found = read_state_dict(find_weights_file(str(path)))
            assert_keys_checked(found, state)
            is_same = all(torch.equal(found[name], tensor) for name, tensor in state.items())
        except UserError as error:
            counts[f"{kind}: refused"] += 1
            longest = max(longest, len(str(error).splitlines()))
        else:
            assert is_same or kind != "zip", (number, kind)
            assert is_same or hashlib.sha256(data).digest() != hashlib.sha256(wholes[kind]).digest()
            counts[f"{kind}: {'same' if is_same else 'other numbers, other sha256'}"] += 1
        assert time.monotonic() - started < 5
    print(dict(counts))
    record_property("counts", dict(counts))
    assert counts.total() == num_files
    assert longest == 1  # line
    assert all(counts[f"{kind}: refused"] for kind in wholes)


def assert_keys_checked(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """What every loader does with the tensors of a file. Raises `UserError`."""
    weights.check_keys(found, state, "file")
    weights.float_arrays(found, "file")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(saved({0: torch.zeros(3), 1: torch.zeros(3)}))
    refusal(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.pth")
    assert "no such file" in refusal(tmp_path)
    (tmp_path / "file").touch()
    refusal(tmp_path / "file" / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("data", [b"", b"hello, this is text\n", b"\x80\x02", b"PK\x03\x04"])
def test_foreign_files_are_refused(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"w{suffix}"
    path.write_bytes(data)
    message = refusal(path)
    assert re.search(r"not a (complete )?\.pth", message)


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><html>404</html>", b'{"error": "not found"}'])
def test_a_page_instead_of_a_file_is_not_called_code(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    assert "not a .pth or .safetensors file" in refusal(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_files_are_refused(tmp_path: Path, state: dict[str, Tensor], suffix: str) -> None:
    data = saved(state) if suffix == ".pth" else safetensors.torch.save(state)
    path = tmp_path / f"w{suffix}"
    for length in (7, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        refusal(path)


# A number whose bytes are missing, a stack that is empty, a tensor without its arguments: each was seen to escape.
@pytest.mark.parametrize("data", [b"X&", b"G\x95P\xb3", b"qGUQn", b"s\xe1\x11-"])
def test_damaged_pickles_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(data)
    refusal(path)


@pytest.mark.slow
def test_untrained_weights_are_the_same_in_another_process() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", DIGEST_IN_ANOTHER_PROCESS], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == weights.load_weights(small_model_config()).sha256


def test_untrained_weights_are_drawn_without_touching_the_callers_generator(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = weights.load_weights(small_model_config())
    assert torch.equal(torch.rand(3), expected)
    torch.manual_seed(2)
    assert weights.load_weights(small_model_config()).sha256 == first.sha256
    assert first.untrained
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(weights.untrained_state(small_model_config()), path)
    assert first.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    again = weights.load_weights(small_model_config(str(path)))
    assert (again.sha256, again.untrained) == (first.sha256, False)
    assert all(np.array_equal(again.arrays[name], array) for name, array in first.arrays.items())


def test_the_initialisation_of_the_method() -> None:
    arrays = weights.load_weights(small_model_config()).arrays
    for name, array in arrays.items():
        assert np.isfinite(array).all()
        if name.endswith("bias"):
            assert not array.any(), name
        elif "norm" in name or name.endswith("gamma"):
            assert (array == 1).all(), name
    bound = np.sqrt(6 / (32 + 128))
    fc1 = arrays["dec_blocks.0.mlp.fc1.weight"]
    assert bound * 0.95 < np.abs(fc1).max() <= bound
    assert 0.01 < arrays["mask_token"].std() < 0.03
    assert 0 < np.abs(arrays["decoder_clstoken"]).max() < 1e-5


def test_a_model_holds_copies_of_read_only_weights() -> None:
    config = small_model_config()
    loaded = weights.load_weights(config)
    for array in loaded.arrays.values():
        array.flags.writeable = False
    model = weights.build_model(config, loaded, torch.device("cpu"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), loaded.arrays[name])
        tensor.add_(1)
    assert weights.load_weights(config).sha256 == loaded.sha256
    assert all(np.array_equal(loaded.arrays[name] + 1, tensor.numpy()) for name, tensor in model.state_dict().items())


def test_what_runs_is_announced(capsys: pytest.CaptureFixture[str], tmp_path: Path, state: dict[str, Tensor]) -> None:
    config = small_model_config()
    weights.announce(config, weights.load_weights(config))
    assert "UNTRAINED" in capsys.readouterr().err
    (tmp_path / "w.pth").write_bytes(saved(state))
    config = small_model_config(str(tmp_path / "w.pth"))
    loaded = weights.load_weights(config)
    weights.announce(config, loaded)
    printed = capsys.readouterr()
    assert loaded.sha256[:12] in printed.err
    assert "non-commercial" in printed.err
    assert printed.out == ""
