"""Reader for MATLAB files of version 5 (`save -v6`, `-v7`), limited to what lists of photos need.

Every length is checked against the available bytes before anything is read or allocated, because damaged files crash
other readers' whole process. Objects, functions and sparse arrays are refused; nothing is executed.
The format: MathWorks, "MAT-File Format" (version 5).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

MatValue = NDArray[np.float64] | str | list["MatValue"] | dict[str, "MatValue"]
"""Numbers (in their MATLAB shape), a text, the cells of a cell array (column by column), or the fields of a struct."""

_MOST_UNPACKED_BYTES = 1 << 28
_MOST_ELEMENTS = 4_000_000
"""Three times as many as in Pittsburgh 250k, the longest published list; an element takes about 100 bytes in Python."""
_DEEPEST = 4
_HEADER_BYTES = 128
_MATRIX, _COMPRESSED, _UTF8 = 14, 15, 16
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_TEXTS = {2: "latin-1", 4: "utf-16", _UTF8: "utf-8", 17: "utf-16", 18: "utf-32"}
_CELL, _STRUCT, _CHAR = 1, 2, 4
_NUMERIC_CLASSES = range(6, 16)
_COMPLEX = 0x0800


class MatError(Exception):
    """Not such a MATLAB file, or a damaged one; the message says why."""


def read_variable(data: bytes, name: str) -> MatValue | None:
    """The variable `name` in a file's bytes; None if there is none. Raises `MatError`."""
    if data[:8] == b"\x89HDF\r\n\x1a\n" or data[:20].startswith(b"MATLAB 7.3 MAT-file"):
        raise NewerMatError(
            "a MATLAB 7.3 (HDF5) file; expected an older format, as written by MATLAB's save(FILE, ..., '-v7')"
        )
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER_BYTES])
    if not data.startswith(b"MATLAB 5.0 MAT-file") or order is None:
        raise MatError("not a MATLAB file of version 5 to 7")
    reader = _Reader(data, "<" if order == "<" else ">")
    place = _HEADER_BYTES
    found: MatValue | None = None
    while place < len(data):
        element, place = reader.element(place, is_top=True)
        array = reader.unpacked(element)
        if reader.name_of(array) == name:
            if found is not None:
                raise MatError(f"two variables are named {name}")
            found = reader.value(array)
    return found


class NewerMatError(MatError):
    """A file of version 7.3, which is another format."""


@dataclass(frozen=True)
class _Element:
    kind: int
    data: bytes


class _Reader:
    """Parses elements of one byte order, with limits on their number and on their total unpacked bytes."""

    def __init__(self, data: bytes, order: Literal["<", ">"]) -> None:
        self._data, self._order = data, order
        self._bytes_left, self._elements_left = _MOST_UNPACKED_BYTES, _MOST_ELEMENTS

    def element(self, place: int, data: bytes | None = None, *, is_top: bool = False) -> tuple[_Element, int]:
        """The element at `place`, and the position of the next one."""
        data = self._data if data is None else data
        self._elements_left -= 1
        if self._elements_left < 0:
            raise MatError(f"more than {_MOST_ELEMENTS:,} elements")
        if place + 8 > len(data):
            raise MatError("it ends inside an element")
        kind, size = struct.unpack_from(f"{self._order}II", data, place)
        if kind >> 16:  # a small element, whose data follows directly
            kind, size, start, end = kind & 0xFFFF, kind >> 16, place + 4, place + 8
            if size > 4:
                raise MatError(f"a short element of {size} bytes")
        else:
            start = place + 8
            end = start + size + (0 if kind == _COMPRESSED else -size % 8)
        if start + size > len(data):
            raise MatError(f"an element of {size:,} bytes, but only {len(data) - start:,} are left")
        if is_top and kind not in (_MATRIX, _COMPRESSED):
            raise MatError(f"an element of kind {kind}, expected a variable")
        return _Element(kind, data[start : start + size]), end

    def unpacked(self, element: _Element) -> bytes:
        """The bytes of a variable."""
        if element.kind == _MATRIX:
            return element.data
        packed = zlib.decompressobj()
        try:
            data = packed.decompress(element.data, self._bytes_left)
        except zlib.error as error:
            raise MatError(f"its compressed data is damaged: {error}") from error
        self._bytes_left -= len(data)
        if not packed.eof:
            raise MatError(f"a truncated variable, or one of more than {_MOST_UNPACKED_BYTES:,} bytes")
        inner, _ = self.element(0, data)
        if inner.kind != _MATRIX:
            raise MatError(f"an element of kind {inner.kind}, expected a variable")
        return inner.data

    def _parts(self, array: bytes) -> list[_Element]:
        parts, place = list[_Element](), 0
        while place < len(array):
            part, place = self.element(place, array)
            parts.append(part)
        if len(parts) < 3 or parts[0].kind != 6 or len(parts[0].data) != 8 or parts[1].kind != 5:
            raise MatError("a variable without flags, shape and name")
        return parts

    def name_of(self, array: bytes) -> str:
        """A variable's name."""
        place = 0
        for _ in range(2):
            _, place = self.element(place, array)
        return self.element(place, array)[0].data.decode("ascii", "replace")

    def value(self, array: bytes, depth: int = 0) -> MatValue:
        """The value of a variable, cell or field."""
        if depth > _DEEPEST:
            raise MatError(f"cells nested more than {_DEEPEST} levels deep")
        if not array:
            return np.empty((0, 0))
        flags, shape_part, _, *rest = self._parts(array)
        flag = int(struct.unpack_from(f"{self._order}I", flags.data)[0])
        shape = [int(side) for side in self._numbers(shape_part)]
        if len(shape) < 2 or min(shape) < 0:
            raise MatError(f"an array of the shape {shape}")
        size = 1
        for side in shape:
            size *= side
        match flag & 0xFF:
            case kind if kind == _CHAR and len(rest) == 1:
                return self._text(rest[0], size, shape)
            case kind if kind in _NUMERIC_CLASSES and len(rest) == 1 and not flag & _COMPLEX:
                values = self._numbers(rest[0])
                if len(values) != size:
                    raise MatError(f"{len(values):,} numbers, expected {size:,}")
                return values.astype(np.float64).reshape(shape, order="F")
            case kind if kind == _CELL:
                return self._nested(rest, size, depth)
            case kind if kind == _STRUCT and size == 1 and len(rest) >= 2:
                return self._fields(rest, depth)
            case kind:
                raise MatError(f"an array of class {kind} and shape {shape}; expected text, numbers, cells or a struct")

    def _nested(self, parts: list[_Element], size: int, depth: int) -> list[MatValue]:
        if len(parts) != size or any(part.kind != _MATRIX for part in parts):
            raise MatError(f"{len(parts):,} cells or fields, expected {size:,}")
        return [self.value(part.data, depth + 1) for part in parts]

    def _fields(self, parts: list[_Element], depth: int) -> dict[str, MatValue]:
        length, names, *values = parts
        lengths = self._numbers(length)
        if len(lengths) != 1 or not 1 <= lengths[0] <= 64 or len(names.data) % int(lengths[0]):
            raise MatError("a struct without field names")
        step = int(lengths[0])
        found = [
            names.data[i : i + step].split(b"\0")[0].decode("ascii", "replace") for i in range(0, len(names.data), step)
        ]
        if len(set(found)) != len(found):
            raise MatError("a struct with two fields of the same name")
        return dict(zip(found, self._nested(values, len(found), depth), strict=True))

    def _numbers(self, part: _Element) -> NDArray[np.generic]:
        kind = _NUMBERS.get(part.kind)
        if kind is None or len(part.data) % int(kind[1]):
            raise MatError(f"numbers of type {part.kind} in {len(part.data):,} bytes")
        return np.frombuffer(part.data, self._order + kind)

    def _text(self, part: _Element, size: int, shape: list[int]) -> str:
        encoding = _TEXTS.get(part.kind)
        if encoding is None or (size and shape[0] != 1):
            raise MatError(f"a text of type {part.kind} and shape {shape}")
        if encoding not in ("latin-1", "utf-8"):
            encoding += "-le" if self._order == "<" else "-be"
        try:
            text = part.data.decode(encoding)
        except UnicodeDecodeError as error:
            raise MatError(f"a text that is not valid {encoding}") from error
        if len(text) != size and len(text.encode("utf-16-le")) // 2 != size and len(part.data) != size:
            raise MatError(f"a text of {len(text)} letters, expected {size}")
        return text
