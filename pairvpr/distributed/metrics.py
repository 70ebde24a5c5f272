"""What a job counts for Prometheus, through Ray: every metric is declared here and nowhere else.

`docs/metrics.md` and the dashboard in `deploy/kubernetes/monitoring/` name them; tests compare both with this file and
with a scrape of a real run. A local Ray exports nothing (`runtime.ray_session`), and recording costs a microsecond.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, TypeVar

import ray
from ray.util.metrics import Counter, Gauge

from pairvpr.data import storage

T = TypeVar("T")
PREFIX = "ray_"
"""Ray puts this before every name, and Prometheus's `_total` after a counter's."""
JOB = "job_id"
"""Label of every metric: Ray's id of the job, as `ray list jobs` shows it."""
SMALL_WORK = "index"
"""Step of the tasks on an index that no progress line is about: checking rows, learning, measuring."""


@dataclass(frozen=True)
class Declared:
    """A metric. `labels` are ours, beside `job_id` and those that Ray adds (docs/metrics.md)."""

    kind: type[Counter] | type[Gauge]
    name: str
    unit: str
    labels: tuple[str, ...]
    about: str
    _made: Counter | Gauge = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        made = self.kind(self.name, description=self.about, tag_keys=(*self.labels, JOB))
        object.__setattr__(self, "_made", made)

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return f"{PREFIX}{self.name}{'_total' if self.kind is Counter else ''}"

    def record(self, value: float, **labels: str) -> None:
        """Add to a counter, or set a gauge, which Ray forgets if it is not set again for some time."""
        labels[JOB] = ray.get_runtime_context().get_job_id() if ray.is_initialized() else ""
        if isinstance(self._made, Gauge):
            self._made.set(float(value), labels)
        elif value:
            self._made.inc(float(value), labels)


_STEP, _OF_STEP = ("step",), ("step", "unit")
PHOTOS = Declared(Counter, "pairvpr_photos", "photos", _STEP, "described, stored as dense features, or trained on")
QUERIES = Declared(Counter, "pairvpr_queries", "queries", _STEP, "re-ranked")
PAIRS = Declared(Counter, "pairvpr_pairs", "pairs", _STEP, "of a query and a candidate, scored by the network")
SHARDS = Declared(Counter, "pairvpr_shards", "shards", _STEP, "indexed, searched, rewritten, or copied from a file")
CHECKPOINTS = Declared(Counter, "pairvpr_checkpoints", "checkpoints", _STEP, "evaluated by search_checkpoints")
READ = Declared(Counter, "pairvpr_read_bytes", "bytes", _STEP, "read whole or by range from a disk or store")
WRITTEN = Declared(Counter, "pairvpr_written_bytes", "bytes", _STEP, "published on a disk or store")
FAILURES = Declared(
    Counter,
    "pairvpr_failures",
    "failures",
    ("step", "what"),
    "what=photo: unreadable or without a row; what=unit: a try raised an error; what=actor: it died or could not start",
)
DONE = Declared(Gauge, "pairvpr_step_done", "see label unit", _OF_STEP, "finished in the step, also by earlier runs")
TOTAL = Declared(Gauge, "pairvpr_step_total", "see label unit", _OF_STEP, "to be done in the step")
RATE = Declared(
    Gauge,
    "pairvpr_step_rate_per_s",
    "label unit per second",
    _OF_STEP,
    "by this run, mean since it began the step; in training since the last logged training step",
)
LOSS = Declared(Gauge, "pairvpr_training_loss", "none", _STEP, "of the last logged training step")

ALL = (PHOTOS, QUERIES, PAIRS, SHARDS, CHECKPOINTS, READ, WRITTEN, FAILURES, DONE, TOTAL, RATE, LOSS)
COUNTED: Mapping[str, Declared] = {metric.unit: metric for metric in (PHOTOS, QUERIES, SHARDS, CHECKPOINTS)}
"""What a step of this unit counts."""

_bytes_lock = threading.Lock()
_bytes_counted = storage.Traffic()


def count_bytes(step: str) -> None:
    """Count what this process has read and written since the last call, as bytes of `step`."""
    global _bytes_counted
    with _bytes_lock:
        before, _bytes_counted = _bytes_counted, storage.traffic()
        READ.record(_bytes_counted.read_bytes - before.read_bytes, step=step)
        WRITTEN.record(_bytes_counted.written_bytes - before.written_bytes, step=step)


@contextmanager
def bytes_of(step: str) -> Iterator[None]:
    """The bytes of the block count for `step`, also where it fails: the process may do another step next."""
    try:
        yield
    finally:
        count_bytes(step)


def counted(work: Callable[..., T], step: str) -> Callable[..., T]:
    """`work`, with its bytes counted for the step."""

    @wraps(work)
    def counting(*arguments: Any) -> T:
        with bytes_of(step):
            return work(*arguments)

    return counting


def count_failure(step: str, what: str, count: int = 1) -> None:
    """Count failures of a step; `what` failed is one of those that `FAILURES` names."""
    FAILURES.record(count, step=step, what=what)


def show_progress(step: str, unit: str, *, done: int, total: int, rate_per_s: float) -> None:
    """Where a step is."""
    for metric, value in ((DONE, done), (TOTAL, total), (RATE, rate_per_s)):
        metric.record(value, step=step, unit=unit)
