"""Operating system errors as one line: the file, the system's message, and what to do."""

from __future__ import annotations

import errno
import getpass
import os
import resource
import tempfile
from contextlib import suppress


def in_a_line(error: BaseException) -> str:
    """An exception as one line; operating system errors get a remedy according to their number."""
    if isinstance(error, MemoryError):
        return "this machine has no memory left; expected more of it, smaller batches (batch_size) or fewer actors"
    lines = str(error).strip().splitlines()
    line = lines[0] if lines else ""
    if isinstance(error, OSError) and error.errno in errno.errorcode and error.strerror:
        about = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        line = ": ".join([*about, error.strerror])
        cure = _cure(error.errno)
        return f"{line}; {cure}" if cure else line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _cure(number: int | None) -> str | None:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"expected free space there, or another place: output=, TMPDIR (now {tempfile.gettempdir()}) for temporary "
            "files, RAY_TMPDIR for Ray's own"
        )
    if number == errno.EROFS:
        return "expected a file system that is not mounted read-only, or another place"
    if number in (errno.EACCES, errno.EPERM):
        return f"expected permission for user {_user()}, or another place"
    if number in (errno.EMFILE, errno.ENFILE):
        return f"expected more open files: `ulimit -n 65536` (now {resource.getrlimit(resource.RLIMIT_NOFILE)[0]})"
    if number == errno.ENAMETOOLONG:
        return "expected shorter names"
    if number in (errno.EAGAIN, errno.ENOMEM):
        return f"expected more memory or processes: `ulimit -u` (now {resource.getrlimit(resource.RLIMIT_NPROC)[0]})"
    if number in (errno.EIO, errno.ESTALE):
        return "expected a disk or mount that answers"
    return None


def _user() -> str:
    with suppress(Exception):  # a container may have users without names
        return getpass.getuser()
    return str(os.getuid())
