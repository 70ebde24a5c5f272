"""Remote files are copied once, verified, shared by processes and bounded; local ones are only verified."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.local import LocalFileSystem

from pairvpr.data import storage
from pairvpr.data.local_cache import LocalCache, private_directory
from pairvpr.errors import UserError
from tests.support.flaky import FlakyFileSystem

REPOSITORY = Path(__file__).parents[2]
READ_MAPPED_WHILE_OTHERS_EVICT = """
import hashlib, mmap, pathlib, sys
import tests.unit.test_local_cache
from pairvpr.data.local_cache import LocalCache
cache = LocalCache(pathlib.Path(sys.argv[1]), 10_000)
for number in range(150):
    value = (number * int(sys.argv[2])) % 7
    data = bytes([value]) * 4000
    digest = hashlib.sha256(data).hexdigest()
    with cache.open(f"local-store://{sys.argv[3]}/{value}", digest, len(data)) as path, open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert mapped[:] == data
"""


class LocalStore(LocalFileSystem):
    """A directory that calls itself remote; unlike memory, other processes see it, and threads read it at once."""

    protocol = "local-store"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("local-store://"))


fsspec.register_implementation("local-store", LocalStore, clobber=True)


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    """An empty remote store, and retries that do not wait."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    FlakyFileSystem.reset()
    yield FlakyFileSystem
    FlakyFileSystem.reset()


@pytest.fixture
def cache(tmp_path: Path) -> LocalCache:
    """Room for 3 files of 100 bytes."""
    return LocalCache(tmp_path / "cache", 300)


def _remote(name: str, num_bytes: int = 100) -> tuple[str, str, int]:
    """A file in the store, as a manifest describes it."""
    url, data = f"flaky://bucket/{name}", (name * num_bytes)[:num_bytes].encode()
    storage.write_bytes(url, data)
    FlakyFileSystem.requests.clear()
    return url, hashlib.sha256(data).hexdigest(), num_bytes


def _read(cache: LocalCache, url: str, digest: str, num_bytes: int) -> bytes:
    with cache.open(url, digest, num_bytes) as path:
        return Path(path).read_bytes()


def _copy(tmp_path: Path, file: tuple[str, str, int]) -> Path:
    return tmp_path / "cache" / file[1]


def _names(tmp_path: Path) -> set[str]:
    return set(os.listdir(tmp_path / "cache"))


def _used_at(path: Path, time_s: int) -> None:
    os.utime(path, (time_s, path.stat().st_mtime))


def test_a_remote_file_is_fetched_once(cache: LocalCache, tmp_path: Path, store: type[FlakyFileSystem]) -> None:
    file = _remote("a")
    for _ in range(2):
        assert _read(cache, *file) == b"a" * 100
    assert _read(LocalCache(tmp_path / "cache", 300), *file) == b"a" * 100
    assert store.requests["open"] == 1
    assert _names(tmp_path) == {file[1]}


def test_one_content_under_two_names_is_kept_once(cache: LocalCache, tmp_path: Path) -> None:
    url, digest, num_bytes = _remote("a")
    storage.write_bytes("flaky://bucket/other", storage.read_bytes(url))
    assert _read(cache, url, digest, num_bytes) == _read(cache, "flaky://bucket/other", digest, num_bytes)
    assert _names(tmp_path) == {digest}


@pytest.mark.parametrize("num_bytes", [0, 1, 2_500_000])
def test_files_of_any_size_come_in_pieces(
    cache: LocalCache, num_bytes: int, monkeypatch: pytest.MonkeyPatch, store: type[FlakyFileSystem]
) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 1_000_000)
    file = _remote("xyz", num_bytes)
    store.failures_left["open"] = 3
    assert _read(cache, *file) == storage.read_bytes(file[0])


def test_a_file_is_hashed_at_its_first_use_by_a_process_and_whenever_it_was_written_to(
    cache: LocalCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, hashed = _remote("a"), list[str]()
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda opened, name: (hashed.append(name), digest(opened, name))[1])
    for _ in range(3):
        _read(cache, *file)
    assert len(hashed) == 1
    another_process = LocalCache(tmp_path / "cache", 300)
    for _ in range(2):
        _read(another_process, *file)
    assert len(hashed) == 2
    _copy(tmp_path, file).write_bytes(b"a" * 100)
    assert _read(cache, *file) == b"a" * 100
    assert len(hashed) == 3


@pytest.mark.parametrize("damage", [b"b" * 100, b"a" * 99, b""])
def test_a_damaged_copy_is_fetched_anew(cache: LocalCache, tmp_path: Path, damage: bytes) -> None:
    file = _remote("a")
    for opened in (cache, cache, LocalCache(tmp_path / "cache", 300)):
        _read(cache, *file)
        _copy(tmp_path, file).write_bytes(damage)
        assert _read(opened, *file) == b"a" * 100
    assert _names(tmp_path) == {file[1]}


@pytest.mark.parametrize("change", ["bytes", "size"])
def test_a_damaged_remote_file_is_named_and_not_kept(cache: LocalCache, tmp_path: Path, change: str) -> None:
    url, digest, num_bytes = _remote("a")
    if change == "bytes":
        storage.write_bytes(url, b"b" * 100)
    message = (
        f"^{url} is damaged: its sha256 differs from the manifest's; restore it, or delete the index and build it again"
    )
    with pytest.raises(UserError, match=message):
        _read(cache, url, digest, num_bytes + (change == "size"))
    assert _names(tmp_path) == set()


def test_a_missing_file_is_file_not_found(cache: LocalCache, tmp_path: Path) -> None:
    for url in ("flaky://bucket/nothing", str(tmp_path / "nothing")):
        with pytest.raises(FileNotFoundError):
            _read(cache, url, "0" * 64, 100)


def test_a_name_that_is_no_sha256_never_becomes_a_path(cache: LocalCache, tmp_path: Path) -> None:
    url, _, num_bytes = _remote("a")
    with pytest.raises(UserError, match="which is not a sha256; build the index again"):
        _read(cache, url, "../../outside", num_bytes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_local_file_is_its_own_copy(cache: LocalCache, tmp_path: Path, prefix: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"value")
    digest = hashlib.sha256(b"value").hexdigest()
    assert _read(cache, f"{prefix}{path}", digest, 5) == b"value"
    assert not (tmp_path / "cache").exists()
    another = hashlib.sha256(b"other").hexdigest()
    for expected, num_bytes in ((another, 5), (digest, 6)):
        with pytest.raises(UserError, match="is damaged: its sha256 differs from the manifest's"):
            _read(cache, f"{prefix}{path}", expected, num_bytes)
    assert path.read_bytes() == b"value"


def test_the_least_recently_used_make_room(cache: LocalCache, tmp_path: Path) -> None:
    files = {name: _remote(name) for name in "abcde"}
    for time_s, name in enumerate("abc"):
        _read(cache, *files[name])
        _used_at(_copy(tmp_path, files[name]), 1000 + time_s)
    _read(cache, *files["a"])  # used just now, so b is the oldest
    _read(cache, *files["d"])
    assert _names(tmp_path) == {files[name][1] for name in "acd"}
    _read(cache, *files["e"])
    assert _names(tmp_path) == {files[name][1] for name in "ade"}


def test_room_is_made_before_the_bytes_come(cache: LocalCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = _remote("a", 250), _remote("b", 200)
    _read(cache, *old)
    seen: list[set[str]] = []
    open_input = storage.open_input
    monkeypatch.setattr(storage, "open_input", lambda url: (seen.append(_names(tmp_path)), open_input(url))[1])
    _read(cache, *new)
    assert old[1] not in seen[0]


def test_the_file_asked_for_stays_though_it_is_too_large(cache: LocalCache, tmp_path: Path) -> None:
    small, large = _remote("a"), _remote("b", 1000)
    _read(cache, *small)
    assert len(_read(cache, *large)) == 1000
    assert _names(tmp_path) == {large[1]}
    _read(cache, *small)
    assert _names(tmp_path) == {small[1]}


def test_only_copies_are_deleted(cache: LocalCache, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_bytes(b"x" * 1000)
    abandoned = tmp_path / "cache" / f".{'0' * 64}.{'1' * 32}.tmp"
    abandoned.touch()
    os.utime(abandoned, (1000, 1000))
    for name in "abcde":
        _read(cache, *_remote(name))
    assert "thesis.txt" in _names(tmp_path)
    assert abandoned.name not in _names(tmp_path)
    assert len(_names(tmp_path)) == 4


def test_a_file_that_another_process_deleted_comes_again(cache: LocalCache, tmp_path: Path) -> None:
    file = _remote("a")
    _read(cache, *file)
    _copy(tmp_path, file).unlink()
    assert _read(cache, *file) == b"a" * 100


def test_a_file_that_is_deleted_while_it_is_in_use_stays_readable(cache: LocalCache, tmp_path: Path) -> None:
    file = _remote("a")
    with cache.open(*file) as path:
        _copy(tmp_path, file).unlink()
        assert Path(path).read_bytes() == b"a" * 100
        np.testing.assert_array_equal(np.memmap(path, np.uint8, "r"), np.full(100, ord("a")))


def test_the_folder_of_copies_is_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = private_directory("copies")
    assert folder == tmp_path / f"copies-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private_directory("copies") == folder
    folder.chmod(0o755)
    with pytest.raises(UserError, match="other users own it or can access it"):
        private_directory("copies")
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="other users own it"):
        private_directory("copies")
    folder.unlink()
    folder.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: 4242)
    (tmp_path / "copies-4242").mkdir(mode=0o700)
    with pytest.raises(UserError, match="other users own it"):
        private_directory("copies")


def test_threads_may_share_a_cache(cache: LocalCache, tmp_path: Path) -> None:
    files = list[tuple[str, str, int]]()
    for name in "ab":
        storage.write_bytes(str(tmp_path / "store" / name), name.encode() * 100)
        digest = hashlib.sha256(name.encode() * 100).hexdigest()
        files.append((f"local-store://{tmp_path}/store/{name}", digest, 100))
    with ThreadPoolExecutor(8) as threads:
        contents = list(threads.map(lambda number: _read(cache, *files[number % 2]), range(40)))
    assert contents == [name * 100 for name in (b"a", b"b")] * 20
    assert _names(tmp_path) == {file[1] for file in files}


@pytest.mark.slow
def test_processes_that_evict_each_others_files_read_whole_ones(tmp_path: Path) -> None:
    source = tmp_path / "store"
    for value in range(7):
        storage.write_bytes(str(source / str(value)), bytes([value]) * 4000)
    command = [sys.executable, "-c", READ_MAPPED_WHILE_OTHERS_EVICT, str(tmp_path / "cache")]
    processes = [subprocess.Popen([*command, str(step), str(source)], cwd=REPOSITORY) for step in (1, 2, 3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert all(len(name) == 64 for name in _names(tmp_path))
