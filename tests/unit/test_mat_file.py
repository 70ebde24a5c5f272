"""MATLAB files: what scipy reads of whole ones, and a `MatError` for damaged ones, whatever the damage."""

from __future__ import annotations

import functools
import io
import logging
import random
import struct
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from pairvpr.data.mat_file import MatError, NewerMatError, read_variable

NAMES = ["000/a.jpg", "001/zürich.jpg", "002/日本.jpg"]


def cells(values: list[Any]) -> np.ndarray[Any, Any]:
    column = np.empty((len(values), 1), object)
    column[:, 0] = values
    return column


@functools.cache
def mat_file(*, compressed: bool) -> bytes:
    fields = {
        "whichSet": "test",
        "dbImageFns": cells(NAMES),
        "utmDb": np.array([[585_000.25, 1.5, -3e-300], [4_477_000.0, 2.0, 7.0]]),
        "qImageFns": cells(["q.jpg"]),
        "utmQ": np.array([[585_000], [4_477_000]], np.int32),
        "nothing": np.empty((0, 0)),
    }
    sink = io.BytesIO()
    savemat(sink, {"other": 1.0, "dbStruct": fields}, do_compression=compressed)
    return sink.getvalue()


@pytest.mark.parametrize("compressed", [False, True])
def test_what_scipy_reads_is_read(compressed: bool) -> None:
    data = mat_file(compressed=compressed)
    found, expected = read_variable(data, "dbStruct"), loadmat(io.BytesIO(data))["dbStruct"].ravel()[0]
    assert isinstance(found, dict)
    assert list(found) == list(expected.dtype.names)
    assert found["dbImageFns"] == [cell.item() for cell in expected["dbImageFns"].ravel()] == NAMES
    for name in ("utmDb", "utmQ", "nothing"):
        np.testing.assert_array_equal(np.asarray(found[name]), expected[name])
    assert read_variable(data, "elsewhere") is None


@pytest.mark.parametrize("value", [{"f": cells([1j])}, {"f": cells([{"g": cells(["x"])}])}])
def test_what_holds_no_list_is_refused_or_read_in_full(value: dict[str, Any]) -> None:
    sink = io.BytesIO()
    savemat(sink, {"dbStruct": value})
    try:
        found = read_variable(sink.getvalue(), "dbStruct")
    except MatError as error:
        assert "expected text, numbers, cells or a struct" in str(error)  # noqa: PT017
    else:
        assert found == {"f": [{"g": ["x"]}]}


def test_a_few_bytes_that_unpack_to_very_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairvpr.data.mat_file._MOST_UNPACKED_BYTES", 1 << 20)
    sink = io.BytesIO()
    savemat(sink, {"dbStruct": np.zeros((1, 1 << 18))}, do_compression=True)
    assert len(sink.getvalue()) < 1 << 14
    with pytest.raises(MatError, match="a truncated variable, or one of more than 1,048,576 bytes"):
        read_variable(sink.getvalue(), "dbStruct")


def test_very_many_empty_elements_are_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros are empty elements of eight bytes each, which take more than ten times as much in Python."""
    monkeypatch.setattr("pairvpr.data.mat_file._MOST_ELEMENTS", 1000)
    flags, shape, name = (6, struct.pack("<II", 1, 0)), (5, struct.pack("<II", 1, 1)), (1, b"dbStruct")
    head = b"".join(struct.pack("<II", kind, len(data)) + data for kind, data in (flags, shape, name))
    payload = head + bytes(1 << 16)
    packed = zlib.compress(struct.pack("<II", 14, len(payload)) + payload)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\1IM"
    with pytest.raises(MatError, match="more than 1,000 elements"):
        read_variable(header + struct.pack("<II", 15, len(packed)) + packed, "dbStruct")


def test_version_73_is_called_by_its_name() -> None:
    header = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\0\2IM"
    for data in (header.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n", b"\x89HDF\r\n\x1a\n" + bytes(100)):
        with pytest.raises(NewerMatError, match=r"a MATLAB 7\.3 \(HDF5\) file; expected an older format.*-v7"):
            read_variable(data, "dbStruct")


def damaged(whole: bytes, rng: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8, 32))):
        place = rng.randrange(len(data))
        data[place] = rng.choice((rng.randrange(256), data[place] ^ 1 << rng.randrange(8), 0, 255))
    if rng.random() < 0.2:
        del data[rng.randrange(len(data)) :]
    elif rng.random() < 0.1:
        place = rng.randrange(len(data))
        data[place:place] = rng.randbytes(rng.randrange(16))
    return bytes(data)


def outcome(data: bytes, whole: Any, *, compressed: bool) -> str:
    try:
        found = read_variable(data, "dbStruct")
    except MatError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return "refused"
    if found is None:
        return "no dbStruct"
    if compressed:  # its checksum covers all of it
        np.testing.assert_equal(found, whole)
        return "the same"
    return "read"


@pytest.mark.parametrize("num_files", [600, pytest.param(50_000, marks=pytest.mark.soak)])
def test_damaged_files_are_refused_or_give_what_the_whole_one_gives(num_files: int) -> None:
    """An uncompressed file has no checksum: a damaged digit or letter in it is another one, and can't be seen."""
    for compressed in (False, True):
        whole, rng, counts = mat_file(compressed=compressed), random.Random(7), Counter[str]()
        expected = read_variable(whole, "dbStruct")
        for _ in range(num_files // 2):
            counts[outcome(damaged(whole, rng), expected, compressed=compressed)] += 1
        logging.getLogger(__name__).warning(
            "%d .mat files, compressed=%s: %s", num_files // 2, compressed, dict(counts)
        )
        assert counts["refused"] > num_files // 8
