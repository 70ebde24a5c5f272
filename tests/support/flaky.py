"""`flaky://`: fsspec's in-memory files behind a store that fails as often as a test says."""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class FlakyFileSystem(MemoryFileSystem):
    """Every request of a kind in `failures_left` raises `error` that many times before it works."""

    protocol = "flaky"
    store = {}  # noqa: RUF012  (as in the class above; not that class's files)
    pseudo_dirs = [""]  # noqa: RUF012
    failures_left: ClassVar[Counter[str]] = Counter()
    requests: ClassVar[Counter[str]] = Counter()
    error: ClassVar[Exception] = OSError("503 slow down")

    @classmethod
    def reset(cls) -> None:
        """An empty store that never fails."""
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.failures_left.clear()
        cls.requests.clear()
        cls.error = OSError("503 slow down")

    def _request(self, kind: str) -> None:
        type(self).requests[kind] += 1
        if self.failures_left[kind] > 0:
            self.failures_left[kind] -= 1
            raise self.error

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._request("cat_file")
        return super().cat_file(path, *args, **kwargs)

    def pipe_file(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._request("pipe_file")
        return super().pipe_file(path, *args, **kwargs)

    def put_file(self, lpath: str, *args: Any, **kwargs: Any) -> Any:
        self._request("put_file")
        return super().put_file(lpath, *args, **kwargs)

    def open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._request("open")
        return super().open(path, *args, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        self._request("info")
        return super().info(path, **kwargs)

    def exists(self, path: str, **kwargs: Any) -> bool:
        """As in `AbstractFileSystem`: whatever goes wrong reads as "no"."""
        try:
            self.info(path)
        except Exception:
            return False
        return True

    def find(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self._request("find")
        return super().find(path, *args, **kwargs)

    def rm_file(self, path: str) -> None:
        self._request("rm_file")
        super().rm_file(path)

    def rm(self, path: Any, *args: Any, **kwargs: Any) -> None:
        self._request("rm")
        super().rm(path, *args, **kwargs)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
