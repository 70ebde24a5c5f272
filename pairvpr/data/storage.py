"""A small interface to local paths and URLs (`s3://`, `hf://`, anything in fsspec); nothing else opens a URL.

Writes are atomic: a name has either nothing, or the old bytes, or all of the new ones. Local files are written to a
temporary file next to the target, then `os.replace`d; object stores publish an object when its upload is complete.
fsspec is imported for the first URL that needs it, so local weights load without it.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar, cast
from urllib.parse import urlsplit

from pairvpr.errors import UserError
from pairvpr.secrets import plain_without_secrets, without_secrets

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

T = TypeVar("T")

NUM_TRIES = 8
FIRST_WAIT_S = 0.2
SECONDS_UNTIL_ABANDONED = 3600.0
PIECE_BYTES = 1 << 22
NO_SPACE_BYTES = 1 << 20


class StorageError(OSError):
    """A storage operation failed; the message is one line that names the URL and the cause."""


class StorageDeniedError(StorageError, PermissionError):
    """Access denied: wrong, missing or expired credentials."""


def reason(error: BaseException) -> str:
    """An error as one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_local(url: str) -> bool:
    """Whether `url` is a path on this machine (plain or `file://`)."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The absolute path or URL; a local path has no `..` in it."""
    if not is_local(url):
        return url.rstrip("/")
    path = local_path(url)
    # `link/..` is the parent of the link's target, which the text alone does not show.
    return str(path.resolve() if ".." in path.parts else path.absolute())


def local_path(url: str) -> Path:
    """The path of a local `url`."""
    return Path(url.removeprefix("file://")).expanduser()


def join(url: str, *names: str) -> str:
    """`url/name/...`; the names are relative."""
    return "/".join([url.rstrip("/") or "/", *names]) if url != "/" else "/" + "/".join(names)


OUTSIDE = r"^$|^[/\\\\]|^[A-Za-z]:[/\\\\]|(^|[/\\\\])\.\.([/\\\\]|$)|://|\x00"
"""Matches paths that are not inside their root; a pattern for both Python's `re` and pyarrow's RE2."""


def is_inside(path: str) -> bool:
    """Whether a relative path stays inside its root: not empty, not absolute, without `..`."""
    return re.search(OUTSIDE, path) is None


@dataclass(frozen=True)
class Traffic:
    """Bytes that went through this module."""

    read_bytes: int = 0
    written_bytes: int = 0


_traffic, _traffic_lock = Traffic(), threading.Lock()


def traffic() -> Traffic:
    """What this process has read whole or by range and what it has published, since its start.

    Files that are opened (`open_input`) count only where they are remote.
    """
    return _traffic


def _count(*, read_bytes: int = 0, written_bytes: int = 0) -> None:
    global _traffic
    with _traffic_lock:
        _traffic = Traffic(_traffic.read_bytes + read_bytes, _traffic.written_bytes + written_bytes)


def read_bytes(url: str) -> bytes:
    """All bytes of a file. Raises `FileNotFoundError`."""
    if is_local(url):
        data = local_path(url).read_bytes()
    else:
        filesystem, path = _remote(url)
        data = cast(bytes, _retried(lambda: filesystem.cat_file(path), url))
    _count(read_bytes=len(data))
    return data


def read_head(url: str, num_bytes: int) -> bytes:
    """The first bytes of a file, or all of a shorter one. Raises `FileNotFoundError`."""
    if is_local(url):
        with local_path(url).open("rb") as file:
            return file.read(num_bytes)
    filesystem, path = _remote(url)
    return cast(bytes, _retried(lambda: filesystem.cat_file(path, start=0, end=num_bytes), url))


def read_ranges(url: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes [start, stop) of a file for each range, in order, read concurrently. Raises `FileNotFoundError`."""
    if is_local(url):
        with local_path(url).open("rb") as file:
            found = [os.pread(file.fileno(), stop - start, start) for start, stop in ranges]
    else:
        filesystem, path = _remote(url)
        starts, stops = [start for start, _ in ranges], [stop for _, stop in ranges]
        paths = [path] * len(ranges)
        answer = _retried(lambda: filesystem.cat_ranges(paths, starts, stops, on_error="raise"), url)
        found = cast(list[bytes], answer)
    _count(read_bytes=sum(map(len, found)))
    return found


def read_json(url: str) -> Any:
    """The value of a JSON file. Raises `FileNotFoundError`."""
    return json.loads(read_bytes(url))


def write_bytes(url: str, data: bytes) -> None:
    """Publish a file atomically, creating its directories; an existing one is replaced."""
    if is_local(url):
        with _local_replacement(local_path(url)) as temporary:
            temporary.write_bytes(data)
    else:
        filesystem, path = _remote(url)
        _upload(url, lambda: filesystem.pipe_file(path, data), lambda: io.BytesIO(data))
    _count(written_bytes=len(data))


def create_exclusively(url: str, data: bytes) -> bool:
    """Publish a file atomically if there is none of this name; returns whether it contains `data` now.

    True: this call created it, or it already had these bytes, perhaps from an earlier try whose response was lost. To
    tell the two apart, make `data` unique. False: it has other content, which stays. If `has_atomic_creation` is False,
    simultaneous callers may all get True.
    """
    for _ in range(NUM_TRIES):
        if _created(url, data):
            return True
        with suppress(FileNotFoundError):  # deleted since: the name is free again
            return read_bytes(url) == data
    raise StorageError(f"{url}: the store reports it both as present and as missing")


def has_atomic_creation(url: str) -> bool:
    """Whether, of several simultaneous `create_exclusively` calls with different bytes, only one returns True.

    This holds for local disks and AWS S3. Other stores may check `If-None-Match` before they write: of 16 simultaneous
    callers on OpenStack Swift, 3 to 14 were told that they had created the file.
    """
    if is_local(url):
        return True
    if not url.startswith(("s3://", "s3a://")):
        return False
    filesystem: Any = _remote(url)[0]
    # Only the client knows its endpoint, which may come from the environment, fsspec's settings or AWS profiles.
    host = urlsplit(_retried(lambda: filesystem.s3, url).meta.endpoint_url).hostname or ""
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


def write_json(url: str, value: object) -> None:
    """Publish `value` as indented JSON, atomically."""
    write_bytes(url, json_bytes(value))


def json_bytes(value: object) -> bytes:
    """`value` as indented JSON without secrets, as every JSON file of the project is written."""
    return (json.dumps(plain_without_secrets(value), indent=2, ensure_ascii=False) + "\n").encode()


@contextmanager
def written_locally(url: str) -> Iterator[Path]:
    """A local path for writing a large file; it is published under `url` when the block ends without error."""
    if is_local(url):
        with _local_replacement(local_path(url)) as temporary:
            yield temporary
            num_bytes = temporary.stat().st_size
        _count(written_bytes=num_bytes)
        return
    filesystem, path = _remote(url)
    with tempfile.TemporaryDirectory(prefix="pairvpr-") as directory:
        local = Path(directory) / "file"
        yield local
        _upload(url, lambda: filesystem.put_file(str(local), path), lambda: local.open("rb"))
        _count(written_bytes=local.stat().st_size)


def open_input(url: str) -> IO[bytes]:
    """A seekable binary reader; remote files are read by range, with retries. Raises `FileNotFoundError`."""
    if is_local(url):
        return local_path(url).open("rb")
    filesystem, path = _remote(url)
    file = cast(IO[bytes], _retried(lambda: filesystem.open(path, "rb"), url))
    return io.BufferedReader(_PatientReader(file, url))


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

    Links to directories are followed; a directory reached twice is listed once, under its own name.
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
    """Delete a file, if it exists."""
    if is_local(url):
        local_path(url).unlink(missing_ok=True)
    elif exists(url):
        filesystem, path = _remote(url)
        with suppress(FileNotFoundError):  # deleted since, perhaps by a try whose response was lost
            _retried(lambda: filesystem.rm_file(path), url)


def remove_tree(url: str) -> None:
    """Delete everything below `url`, if it exists."""
    if is_local(url):
        shutil.rmtree(local_path(url), ignore_errors=True)
        return
    filesystem, path = _remote(url)
    names = _retried(lambda: filesystem.find(path), url) if exists(url) else []
    for first in range(0, len(names), 1000):
        batch = names[first : first + 1000]
        _retried(lambda batch=batch: filesystem.rm(batch), url)


def remove_abandoned(url: str) -> None:
    """Delete temporary files of killed writers below a local `url`: those not written to for an hour."""
    if not is_local(url):
        return
    for folder, _, names in os.walk(local_path(url)):
        for name in names:
            path = Path(folder, name)
            with suppress(OSError):  # another run may clean the same directory
                if _TEMPORARY.fullmatch(name) and time.time() - path.stat().st_mtime > SECONDS_UNTIL_ABANDONED:
                    path.unlink()


def size_bytes(url: str) -> int:
    """Size of a file."""
    if is_local(url):
        return local_path(url).stat().st_size
    filesystem, path = _remote(url)
    return int(_retried(lambda: filesystem.info(path)["size"], url))


def version(url: str) -> str | None:
    """The version of a remote file (ETag, modification time); None if its store reports none.

    Raises `FileNotFoundError`, and `StorageError` if the store can't be reached.
    """
    filesystem, path = _remote(url)
    info = _retried(lambda: filesystem.info(path), url)
    about = {name: str(info[name]) for name in _VERSION_FIELDS if info.get(name) is not None}
    return json.dumps(about | {"size": info.get("size")}, sort_keys=True) if about else None


_VERSION_FIELDS = ("ETag", "etag", "generation", "md5Hash", "content_md5", "LastModified", "last_modified", "created")
"""Names under which fsspec's filesystems report an ETag or a modification time."""


def stamp(url: str) -> str | None:
    """A text that changes when a file's content does, found without reading it; None if there is no such file.

    Size and modification time, or a store's version. Raises `StorageError` if a store can't be reached.
    """
    try:
        if is_local(url):
            status = local_path(url).stat()
            return f"{status.st_size} {status.st_mtime_ns}"
        filesystem, path = _remote(url)
        return _stamp(_retried(lambda: filesystem.info(path), url))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        return None  # a name too long, a loop of links: its reader reports it


def list_stamps(url: str) -> dict[str, str]:
    """The `stamp` of every file below a remote folder, by relative path, from one listing."""
    filesystem, path = _remote(url)
    root_path = path.rstrip("/") + "/"
    try:
        found = cast(dict[str, dict[str, Any]], _retried(lambda: filesystem.find(path, detail=True), url))
    except FileNotFoundError:
        return {}
    return {name.removeprefix(root_path): _stamp(info) for name, info in found.items() if name.startswith(root_path)}


def _stamp(info: Mapping[str, Any]) -> str:
    """A size and the first of `_VERSION_FIELDS`: listings and single responses may have different other fields."""
    identity = next((info[name] for name in _VERSION_FIELDS if info.get(name) is not None), "")
    if isinstance(identity, datetime):
        identity = identity.timestamp()
    return f"{info.get('size')} {identity}"


def sha256(url: str) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with open_input(url) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _walk(root: Path) -> Iterator[str]:
    """All files below `root`. Links come last, so that they never hide a directory's own name."""
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
def _local_replacement(target: Path, publish: Callable[[Path, Path], None] = os.replace) -> Iterator[Path]:
    """A temporary file that is renamed to `target`, after its data is synced, when the block ends without error.

    Raises `OSError` that names the target, even if a library reports a full disk in its own way.
    """
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        publish(temporary, target)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(target)) from error
        _raise_if_full(target, error)
        raise
    except RuntimeError as error:
        _raise_if_full(target, error)
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _raise_if_full(target: Path, error: Exception) -> None:
    """Detect a full disk: the errors of numpy and torch have no error number."""
    try:
        is_full = getattr(error, "errno", None) is None and shutil.disk_usage(target.parent).free < NO_SPACE_BYTES
    except OSError:
        return
    if is_full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target)) from error


def _created(url: str, data: bytes) -> bool:
    """Create a file with `data`; returns False if there is one of this name already."""
    if is_local(url):
        try:
            with _local_replacement(local_path(url), _link_or_create) as temporary:
                temporary.write_bytes(data)
        except FileExistsError:
            return False
        return True
    filesystem, path = _remote(url)

    def create() -> bool:
        try:
            filesystem.pipe_file(path, data, mode="create")
        except OSError as error:
            if isinstance(error, FileExistsError) or _s3_code(error) in {"PreconditionFailed", "412"}:
                return False
            raise
        return True

    return _retried(create, url)


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def _link_or_create(temporary: Path, target: Path) -> None:
    """Give a file a second name if it is free. Raises `FileExistsError`.

    exFAT and SMB may lack links. There, too, only one caller creates the target, but its content follows later.
    """
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with target.open("xb") as file:
            file.write(temporary.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def _upload(url: str, send: Callable[[], object], source: Callable[[], IO[bytes]]) -> None:
    """Upload a file until the store has exactly the bytes that were sent; `source` opens it."""
    filesystem, path = _remote(url)

    def send_and_check() -> None:
        send()
        with source() as sent:
            _check_upload(filesystem, path, sent)

    _retried(send_and_check, url)


def _check_upload(filesystem: AbstractFileSystem, path: str, sent: IO[bytes]) -> None:
    """Compare the store's size and MD5 with those of the upload. Raises `OSError` if they differ.

    An ETag of 32 hex digits is the MD5 of an object in one part, unless the store encrypts objects with a customer's
    key or invents ETags. So if it differs, the bytes themselves are read back.
    """
    try:
        info = filesystem.info(path)
    except FileNotFoundError as error:
        raise OSError("it is missing after its upload") from error
    num_bytes = sent.seek(0, os.SEEK_END)
    if info["size"] != num_bytes:
        raise OSError(f"{info['size']} of {num_bytes} bytes arrived")
    etag = str(info.get("ETag", "")).strip('"')
    if _MD5.fullmatch(etag) and etag != (md5 := _md5(sent)):
        with cast(IO[bytes], filesystem.open(path, "rb")) as held:
            if _md5(held) != md5:
                raise OSError("the stored bytes differ from those that were sent")


_MD5 = re.compile(r"[0-9a-f]{32}")


def _md5(file: IO[bytes]) -> str:
    """Hex digest of all bytes of an open file."""
    file.seek(0)
    digest = hashlib.md5(usedforsecurity=False)
    while piece := file.read(PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


class _PatientReader(io.RawIOBase):
    """A remote file whose reads are retried. A failed read does not move the position."""

    def __init__(self, file: IO[bytes], url: str) -> None:
        self._file, self._url = file, url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        piece = _retried(lambda: self._file.read(len(buffer)), self._url)
        buffer[: len(piece)] = piece
        _count(read_bytes=len(piece))
        return len(piece)

    def close(self) -> None:
        self._file.close()
        super().close()


def _remote(url: str) -> tuple[AbstractFileSystem, str]:
    """The filesystem of a URL and the path in it. Listings are never cached, because other processes may write."""
    from fsspec.core import url_to_fs

    try:
        filesystem, path = url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"can't open {url}: {str(error).splitlines()[0]}") from error
    return filesystem, path


def _retried(call: Callable[[], T], url: str) -> T:
    """Retry, with growing pauses, while a store is busy; a missing file is a valid response.

    Raises `StorageError` for any other final error of a store or its client library.
    """
    for attempt in range(NUM_TRIES):
        try:
            return call()
        except PermissionError as error:
            raise StorageDeniedError(_fault(url, error)) from error
        except Exception as error:
            cause = error.__cause__
            if isinstance(error, FileNotFoundError) and cause is not None and _is_broken_connection(cause):
                error = OSError(reason(cause))  # fsspec reports a file as missing if its server can't be reached
            if isinstance(error, (FileNotFoundError, FileExistsError, IsADirectoryError)) and not _has_lost_upload(
                error
            ):
                raise
            busy = isinstance(error, OSError) or _is_broken_connection(error)
            if not busy and type(error).__module__ == "builtins":
                raise  # a ValueError or the like is a bug in the program
            if not busy or attempt == NUM_TRIES - 1:
                raise StorageError(_fault(url, error)) from error
            time.sleep(FIRST_WAIT_S * 2**attempt)
    raise AssertionError("unreachable")


_BROKEN = {
    *("HTTPClientError", "ConnectionError", "IncompleteReadError", "FlexibleChecksumError", "ResponseParserError"),
    *("ClientPayloadError", "ClientConnectionError", "IncompleteRead", "TransportError"),
}


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a client library (botocore, aiohttp or httpx, by class name) got no response or an incomplete one."""
    return "Timeout" in type(error).__name__ or any(base.__name__ in _BROKEN for base in type(error).__mro__)


def _has_lost_upload(error: Exception) -> bool:
    """Whether a store no longer knows a multipart upload, as after a lost response to its last request."""
    return _s3_code(error) == "NoSuchUpload"


def _s3_code(error: BaseException) -> str:
    """S3's error code, such as "NoSuchKey"; empty for other stores' errors."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _fault(url: str, error: Exception) -> str:
    return without_secrets(f"{url}: {type(error).__name__}: {reason(error)}")
