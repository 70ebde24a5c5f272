"""Two claims of one directory at the same moment, with different settings."""

from __future__ import annotations

import errno
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from pairvpr.data import storage
from pairvpr.data.claim import check_claim, claim
from pairvpr.errors import UserError


def settings_of(number: int) -> dict[str, Any]:
    """Settings that differ from those of other numbers."""
    return {"model": {"name": "tiny"}, "index_num_shards": number}


def claim_twice_at_once(directory: str, jitter_s: float, seed: int) -> list[bool]:
    """Whether two claims of the same moment, with different settings, succeeded."""
    rng, start = random.Random(seed), threading.Barrier(2)
    delays_s = [rng.random() * jitter_s, rng.random() * jitter_s]

    def one(number: int) -> bool:
        start.wait()
        time.sleep(delays_s[number])
        try:
            claim(directory, settings_of(number), "output")
        except UserError:
            return False
        check_claim(directory, settings_of(number), "output")
        return True

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(one, range(2)))


def slow_down(monkeypatch: pytest.MonkeyPatch, longest_s: float) -> None:
    """Every request of a claim starts after a random while."""
    rng = random.Random(0)
    for name in ("exists", "create_exclusively", "write_bytes", "list_files", "read_bytes", "remove_file"):
        request = getattr(storage, name)

        def later(*arguments: Any, request: Any = request) -> Any:
            time.sleep(rng.random() * longest_s)
            return request(*arguments)

        monkeypatch.setattr(storage, name, later)


def refuse_links(*_: object) -> None:
    """As `os.link` on exFAT."""
    raise PermissionError(errno.EPERM, "Operation not permitted")
