"""Work on the shards of an index as Ray tasks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from pairvpr.data import storage
from pairvpr.distributed.metrics import SMALL_WORK, counted
from pairvpr.distributed.progress import Progress
from pairvpr.distributed.runtime import cpus_of_a_shard, share_cpus
from pairvpr.errors import IncompleteRunError, UserError
from pairvpr.terminal import say

MAX_TRIES = 3
LARGE_BYTES = 1 << 16


class RayRunner:
    """A `Runner` on Ray tasks, which are retried when a node or the storage fails.

    A task reserves a whole CPU, which bounds the number of shards in a node's memory at once.
    """

    def run(self, label: str, work: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        """See `Runner`. A user's error in a task (`UserError` etc.) is raised here unchanged."""
        options = {"num_cpus": cpus_of_a_shard(), "max_retries": MAX_TRIES, "retry_exceptions": [OSError]}
        task: Any = ray.remote(**options)(counted(work, label or SMALL_WORK))
        answers = _in_order(task, _large_ones_shared(arguments))
        if not label:
            return list(answers)
        found = []
        with Progress(label, len(arguments), "shards") as progress:
            for answer in answers:
                found.append(answer)
                progress.add(1)
        return found

    def say(self, line: str) -> None:
        """On the driver's stderr."""
        say(line)


def _in_order(task: Any, arguments: Sequence[Sequence[Any]]) -> Iterator[Any]:
    """The tasks' answers; no more run at once than this job's share of the cluster has room for."""
    share = share_cpus()
    at_once = None if share is None else max(1, int(share // cpus_of_a_shard()))
    waiting = iter(arguments)
    refs = deque(task.remote(*one) for one in islice(waiting, at_once))
    while refs:
        yield _get(refs.popleft())
        refs.extend(task.remote(*one) for one in islice(waiting, 1))


def _large_ones_shared(arguments: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    """Large arrays go into the object store once, however many tasks get them."""
    refs: dict[int, Any] = {}

    def stored(value: Any) -> Any:
        if not isinstance(value, np.ndarray) or value.nbytes <= LARGE_BYTES:
            return value
        if id(value) not in refs:
            refs[id(value)] = ray.put(value)
        return refs[id(value)]

    return [[stored(value) for value in one] for one in arguments]


def _get(ref: Any) -> Any:
    try:
        return ray.get(ref)
    except RayTaskError as error:
        if isinstance(error.cause, UserError | IncompleteRunError | storage.StorageError):
            raise error.cause from None
        raise
    except RayError as error:  # its worker or node died, most likely because it ran out of memory
        why = f"{type(error).__name__}: {storage.reason(error)}"
        raise IncompleteRunError(
            f"index: a task died {MAX_TRIES + 1} times ({why}); finished work is kept. Expected more memory, or "
            "more and smaller shards (index.num_shards)"
        ) from error
