"""Local copies of remote files, named by their sha256, with a limit on total size.

Several processes may share a directory. A copy appears once it is complete and verified. A process that exceeds the
limit deletes the least recently used copies. A caller gets an open file and not a name: a file that another process
deletes stays readable until the last descriptor is closed.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from pairvpr.data import storage
from pairvpr.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_State = tuple[int, int, int, int]
"""A file's device, inode, size and modification time."""


def cache_directory(given: str | None) -> Path:
    """The default directory for copies."""
    return Path(given) if given else private_directory("pairvpr-cache")


class LocalCache:
    """Opens files by their sha256: local files in place, remote files as a verified copy in `directory`.

    Every process hashes a file before its first use, and again whenever its inode, size or modification time has
    changed. Keep one instance per process.
    """

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._verified = dict[str, _State]()

    @contextmanager
    def open(self, url: str, sha256: str, num_bytes: int) -> Iterator[str]:
        """A path to a file with this content; valid until the block ends, even if the file is deleted.

        Raises `UserError` if `url` has other content, and `FileNotFoundError` if it does not exist.
        """
        with self._opened(url, sha256, num_bytes) as file:
            yield f"/dev/fd/{file.fileno()}"

    def _opened(self, url: str, sha256: str, num_bytes: int) -> BufferedReader:
        if storage.is_local(url):
            file = storage.local_path(url).open("rb")
            if self._is_whole(file, sha256, num_bytes):
                return file
            file.close()
            raise damaged(url)
        if not _SHA256.fullmatch(sha256):
            raise UserError(f"{url}: the manifest gives it {sha256!r}, which is not a sha256; build the index again")
        path = self._directory / sha256
        while (file := self._copy(path, sha256, num_bytes)) is None:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            storage.remove_abandoned(str(self._directory))
            self._make_room(path, num_bytes)
            _fetch(url, path, sha256, num_bytes)
        self._make_room(path, num_bytes)
        return file

    def _copy(self, path: Path, sha256: str, num_bytes: int) -> BufferedReader | None:
        """The open copy, marked as just used; None if there is none. A damaged copy is deleted."""
        try:
            file = path.open("rb")
        except FileNotFoundError:
            return None
        if self._is_whole(file, sha256, num_bytes):
            with suppress(OSError):  # deleted since
                os.utime(path, ns=(time.time_ns(), os.fstat(file.fileno()).st_mtime_ns))
            return file
        file.close()
        path.unlink(missing_ok=True)
        return None

    def _is_whole(self, file: BufferedReader, sha256: str, num_bytes: int) -> bool:
        """Whether an open file has this content; its position is then back at the start."""
        status = os.fstat(file.fileno())
        state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if status.st_size != num_bytes:
            return False
        if self._verified.get(sha256) != state:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                return False
            file.seek(0)
            self._verified[sha256] = state
        return True

    def _make_room(self, kept: Path, num_bytes: int) -> None:
        """Delete the least recently used copies until `kept`, of `num_bytes`, fits in."""
        others = _copies(self._directory, kept)
        total_bytes = num_bytes + sum(size for _, size, _ in others)
        for _, size, path in sorted(others):
            if total_bytes <= self._capacity_bytes:
                return
            path.unlink(missing_ok=True)
            total_bytes -= size


def private_directory(name: str) -> Path:
    """A folder in the temporary directory that only this user can read and write.

    Raises `UserError` if another user owns it, or others can access it.
    """
    directory = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    with suppress(FileExistsError):
        directory.mkdir(mode=0o700)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise UserError(
            f"{directory}: other users own it or can access it; expected a private folder, or index.cache_dir=..."
        )
    return directory


def _copies(directory: Path, kept: Path) -> list[tuple[int, int, Path]]:
    """Time of last use, size and path of every copy except `kept`; other files are ignored."""
    found = list[tuple[int, int, Path]]()
    for name in os.listdir(directory) if directory.is_dir() else []:
        path = directory / name
        if _SHA256.fullmatch(name) and path != kept:
            with suppress(FileNotFoundError):  # another process makes room too
                status = path.stat()
                found.append((status.st_atime_ns, status.st_size, path))
    return found


def _fetch(url: str, path: Path, sha256: str, num_bytes: int) -> None:
    """Download a file; it gets its name when it is complete. Raises `UserError` if its content differs."""
    digest = hashlib.sha256()
    with storage.written_locally(str(path)) as temporary:
        with storage.open_input(url) as source, temporary.open("wb") as target:
            while piece := source.read(storage.PIECE_BYTES):
                digest.update(piece)
                target.write(piece)
        if digest.hexdigest() != sha256 or temporary.stat().st_size != num_bytes:
            raise damaged(url)


def damaged(url: str) -> UserError:
    """The error for a file whose bytes are not the original ones."""
    return UserError(
        f"{url} is damaged: its sha256 differs from the manifest's; restore it, or delete the index and build it again"
    )
