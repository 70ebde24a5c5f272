"""Local paths and URLs (`s3://`, `hf://`, any fsspec one) behind a few verbs; nothing else opens a URL.

Writes are atomic: a name holds either nothing, or the old bytes, or all of the new ones. Locally that is a
temporary file beside the target and `os.replace`; object stores publish an object when its upload is complete.
fsspec is imported when the first URL that needs it arrives, so the network loads local weights without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from pairvpr.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

NUM_TRIES = 5
FIRST_WAIT_S = 0.2


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine (plain or `file://`)."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The same place, independent of the current directory."""
    return str(_local_path(url).absolute()) if is_local(url) else url.rstrip("/")


def join(url: str, *names: str) -> str:
    """`url/name/...`; the names are relative."""
    return "/".join([url.rstrip("/") or "/", *names]) if url != "/" else "/" + "/".join(names)


def read_bytes(url: str) -> bytes:
    """All bytes of a file. Raises `FileNotFoundError`."""
    if is_local(url):
        return _local_path(url).read_bytes()
    filesystem, path = _remote(url)
    return cast(bytes, _retried(lambda: filesystem.cat_file(path)))


def read_json(url: str) -> Any:
    """The value of a JSON file. Raises `FileNotFoundError`."""
    return json.loads(read_bytes(url))


def write_bytes(url: str, data: bytes) -> None:
    """Publish a file atomically, creating its directories; an existing one is replaced."""
    if is_local(url):
        with _local_replacement(_local_path(url)) as temporary:
            temporary.write_bytes(data)
        return
    filesystem, path = _remote(url)
    _retried(lambda: filesystem.pipe_file(path, data))


def write_json(url: str, value: object) -> None:
    """Publish `value` as indented JSON, atomically."""
    write_bytes(url, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def written_locally(url: str) -> Iterator[Path]:
    """A local path to write a large file to; it is published under `url` when the block ends without error."""
    if is_local(url):
        with _local_replacement(_local_path(url)) as temporary:
            yield temporary
        return
    filesystem, path = _remote(url)
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as directory:
        local = Path(directory) / "file"
        yield local
        _retried(lambda: filesystem.put_file(str(local), path))


def open_input(url: str) -> IO[bytes]:
    """A seekable binary reader; remote files are read by range. Raises `FileNotFoundError`."""
    if is_local(url):
        return _local_path(url).open("rb")
    filesystem, path = _remote(url)
    return cast(IO[bytes], _retried(lambda: filesystem.open(path, "rb")))


def exists(url: str) -> bool:
    """Whether there is a file or a directory of this name."""
    if is_local(url):
        return _local_path(url).exists()
    filesystem, path = _remote(url)
    return _retried(lambda: filesystem.exists(path))


def list_files(url: str) -> list[str]:
    """Paths of all files below `url`, relative to it, sorted by code point. Empty if there is none."""
    if is_local(url):
        root = _local_path(url)
        found = [
            (Path(folder) / name).relative_to(root).as_posix()
            for folder, _, names in os.walk(root, followlinks=True)
            for name in names
        ]
        return sorted(found)
    filesystem, path = _remote(url)
    root_path = path.rstrip("/") + "/"
    try:
        names = _retried(lambda: filesystem.find(path))
    except FileNotFoundError:
        return []
    return sorted(name.removeprefix(root_path) for name in names if name.startswith(root_path))


def remove_file(url: str) -> None:
    """Delete a file; that it is not there is fine."""
    if is_local(url):
        _local_path(url).unlink(missing_ok=True)
    elif exists(url):
        filesystem, path = _remote(url)
        _retried(lambda: filesystem.rm_file(path))


def remove_tree(url: str) -> None:
    """Delete everything below `url`; nothing there is fine."""
    if is_local(url):
        shutil.rmtree(_local_path(url), ignore_errors=True)
        return
    filesystem, path = _remote(url)
    names = _retried(lambda: filesystem.find(path)) if exists(url) else []
    for first in range(0, len(names), 1000):
        batch = names[first : first + 1000]
        _retried(lambda batch=batch: filesystem.rm(batch))


def size_bytes(url: str) -> int:
    """Size of a file."""
    if is_local(url):
        return _local_path(url).stat().st_size
    filesystem, path = _remote(url)
    return int(_retried(lambda: filesystem.info(path)["size"]))


def sha256(url: str) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open_input(url) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _local_path(url: str) -> Path:
    return Path(url.removeprefix("file://")).expanduser()


@contextmanager
def _local_replacement(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its name, data first, when the block ends without error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _remote(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL and the path in it. Listings are never cached: another process may write."""
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"can't open {url}: {str(error).splitlines()[0]}") from error
    return filesystem, path


def _retried(call: Callable[[], T]) -> T:
    """Try again, with growing pauses, what a busy store refused; a missing file is an answer, not a fault."""
    for attempt in range(NUM_TRIES):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            if attempt == NUM_TRIES - 1:
                raise
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")
