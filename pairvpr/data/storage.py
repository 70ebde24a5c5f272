"""Local paths and URLs (`s3://`, `hf://`, any fsspec one) behind a few verbs; nothing else opens a URL.

Writes are atomic: a name holds either nothing, or the old bytes, or all of the new ones. Locally that is a
temporary file beside the target and `os.replace`; object stores publish an object when its upload is complete.
fsspec is imported when the first URL that needs it arrives, so the network loads local weights without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast

from pairvpr.errors import UserError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

NUM_TRIES = 8
FIRST_WAIT_S = 0.2
SECONDS_UNTIL_ABANDONED = 3600.0
PIECE_BYTES = 1 << 22


class StorageError(OSError):
    """A store did not do what it was asked; the message is one line that names the URL and the cause."""


class StorageDeniedError(StorageError, PermissionError):
    """A store refused: wrong, missing or expired credentials."""


def reason(error: BaseException) -> str:
    """What went wrong, as one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_local(url: str) -> bool:
    """Whether `url` is a path of this machine (plain or `file://`)."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The same place, independent of the current directory; a local path has no `..` in it."""
    if not is_local(url):
        return url.rstrip("/")
    path = local_path(url)
    # `link/..` is the parent of what the link names, which the text alone does not tell.
    return str(path.resolve() if ".." in path.parts else path.absolute())


def local_path(url: str) -> Path:
    """The path that a local `url` names."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *names: str) -> str:
    """`url/name/...`; the names are relative."""
    return "/".join([url.rstrip("/") or "/", *names]) if url != "/" else "/" + "/".join(names)


def read_bytes(url: str) -> bytes:
    """All bytes of a file. Raises `FileNotFoundError`."""
    if is_local(url):
        return local_path(url).read_bytes()
    filesystem, path = _remote(url)
    return cast(bytes, _retried(lambda: filesystem.cat_file(path), url))


def read_head(url: str, num_bytes: int) -> bytes:
    """The first bytes of a file, or all of a shorter one. Raises `FileNotFoundError`."""
    if is_local(url):
        with local_path(url).open("rb") as file:
            return file.read(num_bytes)
    filesystem, path = _remote(url)
    return cast(bytes, _retried(lambda: filesystem.cat_file(path, start=0, end=num_bytes), url))


def read_json(url: str) -> Any:
    """The value of a JSON file. Raises `FileNotFoundError`."""
    return json.loads(read_bytes(url))


def write_bytes(url: str, data: bytes) -> None:
    """Publish a file atomically, creating its directories; an existing one is replaced."""
    if is_local(url):
        with _local_replacement(local_path(url)) as temporary:
            temporary.write_bytes(data)
        return
    filesystem, path = _remote(url)
    _retried(lambda: filesystem.pipe_file(path, data), url)


def write_json(url: str, value: object) -> None:
    """Publish `value` as indented JSON, atomically."""
    write_bytes(url, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


@contextmanager
def written_locally(url: str) -> Iterator[Path]:
    """A local path to write a large file to; it is published under `url` when the block ends without error."""
    if is_local(url):
        with _local_replacement(local_path(url)) as temporary:
            yield temporary
        return
    filesystem, path = _remote(url)
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as directory:
        local = Path(directory) / "file"
        yield local
        _retried(lambda: filesystem.put_file(str(local), path), url)


def open_input(url: str) -> IO[bytes]:
    """A seekable binary reader; remote files are read by range. Raises `FileNotFoundError`."""
    if is_local(url):
        return local_path(url).open("rb")
    filesystem, path = _remote(url)
    return cast(IO[bytes], _retried(lambda: filesystem.open(path, "rb"), url))


def exists(url: str) -> bool:
    """Whether there is a file or a directory of this name."""
    if is_local(url):
        return local_path(url).exists()
    filesystem, path = _remote(url)
    try:
        _retried(lambda: filesystem.info(path), url)  # fsspec's own `exists` reads a busy store as "no"
    except FileNotFoundError:
        return False
    return True


def list_files(url: str) -> list[str]:
    """Paths of all files below `url`, relative to it, sorted by code point. Empty if there is none.

    Links to directories are followed; a directory that is reached twice is listed once, under its own name.
    """
    if is_local(url):
        root = local_path(url)
        return sorted(Path(file).relative_to(root).as_posix() for file in _walk(root))
    filesystem, path = _remote(url)
    root_path = path.rstrip("/") + "/"
    try:
        names = _retried(lambda: filesystem.find(path), url)
    except FileNotFoundError:
        return []
    return sorted(name.removeprefix(root_path) for name in names if name.startswith(root_path))


def remove_file(url: str) -> None:
    """Delete a file; that it is not there is fine."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
    elif exists(url):
        filesystem, path = _remote(url)
        _retried(lambda: filesystem.rm_file(path), url)


def remove_tree(url: str) -> None:
    """Delete everything below `url`; nothing there is fine."""
    if is_local(url):
        shutil.rmtree(local_path(url), ignore_errors=True)
        return
    filesystem, path = _remote(url)
    names = _retried(lambda: filesystem.find(path), url) if exists(url) else []
    for first in range(0, len(names), 1000):
        batch = names[first : first + 1000]
        _retried(lambda batch=batch: filesystem.rm(batch), url)


def remove_abandoned(url: str) -> None:
    """Delete the temporary files of killed writers below a local `url`: those that nobody wrote to for an hour."""
    if not is_local(url):
        return
    for folder, _, names in os.walk(local_path(url)):
        for name in names:
            path = Path(folder, name)
            with suppress(OSError):  # another run may clear the same directory
                if _TEMPORARY.fullmatch(name) and time.time() - path.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                    path.unlink()


def size_bytes(url: str) -> int:
    """Size of a file."""
    if is_local(url):
        return local_path(url).stat().st_size
    filesystem, path = _remote(url)
    return int(_retried(lambda: filesystem.info(path)["size"], url))


def sha256(url: str) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open_input(url) as file:

        def read() -> bytes:
            return file.read(PIECE_BYTES)

        while piece := read() if is_local(url) else _retried(read, url):
            digest.update(piece)
    return digest.hexdigest()


def _walk(root: Path) -> Iterator[str]:
    """All files below `root`. Links come after everything else, so that they never hide a directory's own name."""
    folders, links = [str(root)], list[str]()
    seen = set[tuple[int, int]]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.is_symlink() and os.path.isdir(entry.path):
                links.append(entry.path)
            else:
                yield entry.path


_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


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


def _retried(call: Callable[[], T], url: str) -> T:
    """Try again, with growing pauses, what a busy store refused; a missing file is an answer, not a fault.

    Raises `StorageError` for whatever else a store or its client library answers in the end.
    """
    for attempt in range(NUM_TRIES):
        try:
            return call()
        except (FileNotFoundError, IsADirectoryError):
            raise
        except PermissionError as error:
            raise StorageDeniedError(_fault(url, error)) from error
        except Exception as error:
            busy = isinstance(error, OSError) or "Timeout" in type(error).__name__
            if not busy and type(error).__module__ == "builtins":
                raise  # a ValueError or the like is a defect of the program
            if not busy or attempt == NUM_TRIES - 1:
                raise StorageError(_fault(url, error)) from error
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


def _fault(url: str, error: Exception) -> str:
    return f"{url}: {type(error).__name__}: {reason(error)}"
