"""What `/metrics` says, in the format of Prometheus. Each replica of the door counts for itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PHOTOS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one door."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "pairvpr_requests", "Requests by route and HTTP status.", ["route", "status"], registry=self._registry
        )
        self.seconds = Histogram(
            "pairvpr_step_seconds",
            "Seconds of each step of an answer.",
            ["step"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self.photos = Histogram("pairvpr_batch_photos", "Photos of a request.", buckets=PHOTOS, registry=self._registry)
        self.generation = Gauge(
            "pairvpr_generation", "The open generation of each index.", ["index"], registry=self._registry
        )

    def watch(self, numbers: Mapping[str, tuple[str, Callable[[], float]]]) -> None:
        """Numbers that are asked for when they are read: by name, what they say and where they come from."""
        for name, (what, read) in numbers.items():
            Gauge(f"pairvpr_{name}", what, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """All of them."""
        return generate_latest(self._registry)
