"""Copies of remote files on this machine's disk, by content: named for their sha256 and bounded in bytes.

Several processes may share a directory. A file appears when it is complete and verified, whoever fetched it; whichever
process finds too much there deletes the least recently used. What another process has open or mapped stays readable to
it, as Linux keeps a deleted file until the last of its users lets go.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from pairvpr.data import storage
from pairvpr.errors import UserError

_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_directory(given: str | None) -> Path:
    """Where copies are kept on this machine, unless a directory is given."""
    return Path(given) if given else Path(tempfile.gettempdir()) / "pairvpr-cache"


class LocalCache:
    """Local paths of files known by their sha256: of local ones their own, of remote ones a copy in `directory`.

    Keep one for the whole process: each instance verifies a file that it did not fetch when it is first asked for it.
    """

    def __init__(self, directory: Path, capacity_bytes: int) -> None:
        self._directory = directory
        self._capacity_bytes = capacity_bytes
        self._verified = set[tuple[Path, str]]()

    def path(self, url: str, sha256: str, num_bytes: int) -> Path:
        """The path of a file with this content; it is there on return, and another process may delete it later.

        Raises `UserError` where what `url` holds is another content, `FileNotFoundError` where it holds nothing.
        """
        if storage.is_local(url):
            path = storage.local_path(url)
            if not self._is_whole(path, sha256, num_bytes):
                raise damaged(url)
            return path
        if not _SHA256.fullmatch(sha256):
            raise UserError(f"{url}: the manifest's sha256 of it, {sha256!r}, is not one; build the index again")
        path = self._directory / sha256
        while not self._is_cached(path, sha256, num_bytes):
            storage.remove_abandoned(str(self._directory))
            self._make_room(path, num_bytes)
            _fetch(url, path, sha256, num_bytes)
            self._verified.add((path, sha256))
        self._make_room(path, num_bytes)
        return path

    def _is_cached(self, path: Path, sha256: str, num_bytes: int) -> bool:
        """Whether the copy is there, used just now; a damaged one is deleted."""
        try:
            os.utime(path)
            if self._is_whole(path, sha256, num_bytes):
                return True
            path.unlink()
        except FileNotFoundError:
            pass
        return False

    def _is_whole(self, path: Path, sha256: str, num_bytes: int) -> bool:
        """Whether a file has this content; its bytes are read once. Raises `FileNotFoundError`."""
        if path.stat().st_size != num_bytes:
            return False
        if (path, sha256) not in self._verified:
            if storage.sha256(str(path)) != sha256:
                return False
            self._verified.add((path, sha256))
        return True

    def _make_room(self, kept: Path, num_bytes: int) -> None:
        """Delete the least recently used copies until `kept`, of `num_bytes`, fits in beside the others."""
        others = _copies(self._directory, kept)
        total_bytes = num_bytes + sum(size for _, size, _ in others)
        for _, size, path in sorted(others):
            if total_bytes <= self._capacity_bytes:
                return
            path.unlink(missing_ok=True)
            total_bytes -= size


def _copies(directory: Path, kept: Path) -> list[tuple[int, int, Path]]:
    """Time of last use, size and path of every copy but `kept`; nothing else that lies there."""
    found = list[tuple[int, int, Path]]()
    for name in os.listdir(directory) if directory.is_dir() else []:
        path = directory / name
        if _SHA256.fullmatch(name) and path != kept:
            with suppress(FileNotFoundError):  # another process makes room too
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
    return found


def _fetch(url: str, path: Path, sha256: str, num_bytes: int) -> None:
    """Download a file, which takes its name when it is complete. Raises `UserError` if its bytes are others."""
    digest = hashlib.sha256()
    with storage.written_locally(str(path)) as temporary:
        with storage.open_input(url) as source, temporary.open("wb") as target:
            while piece := source.read(storage.PIECE_BYTES):
                digest.update(piece)
                target.write(piece)
        if digest.hexdigest() != sha256 or temporary.stat().st_size != num_bytes:
            raise damaged(url)


def damaged(url: str) -> UserError:
    """What to raise for a file whose bytes are not those that were written."""
    return UserError(
        f"{url} is damaged: its sha256 is not the manifest's; restore it, or delete the index and build it again"
    )
