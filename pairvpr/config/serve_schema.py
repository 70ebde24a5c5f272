"""The settings of the job `serve`. See `schema.py`, which has the sections that it shares with `query`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from pairvpr.config.checks import require, require_positive, require_text
from pairvpr.config.schema import (
    ClusterConfig,
    DenseFeatures,
    DescribePassConfig,
    DescriptorConfig,
    ModelConfig,
    RerankConfig,
    SearchConfig,
)

OWN_MACHINE = ("127.0.0.1", "::1", "localhost")
HAPROXY_HOSTS = ("127.0.0.1", "0.0.0.0")
DEFAULT_NAME = "default"
TOGETHER = "*"
"""The name that asks all indices."""


@dataclass(kw_only=True)
class ServedIndexConfig(SearchConfig):
    """The index to serve, and how it is searched."""

    path: str | None = None
    """Index directory (path or URL) written by build_index or evaluate; several: indices={NAME: INDEX, ...}."""

    def __post_init__(self) -> None:
        SearchConfig.__post_init__(self)
        require_text(self, "index.", "path")


@dataclass(kw_only=True)
class LimitsConfig:
    """What one service takes. A request beyond them is refused with one line and its HTTP status."""

    max_body_bytes: int = 32 << 20
    """Bytes of a request's body; more = 413."""
    max_megapixels: float = 50.0
    """Pixels of a photo, known from its header before it is decoded; more = 422. At most model.max_megapixels."""
    max_photos: int = 16
    """Photos in a batch; more = 413."""
    num_at_once: int = 2
    """Requests that a replica computes at the same time, each on the threads of describe and rerank."""
    max_waiting: int = 8
    """Requests that wait for their turn in a replica; more = 503 with Retry-After."""
    max_connections: int = 256
    """Requests that are open at the same time, those still sending their body included; more = 503."""
    timeout_s: float = 30.0
    """Seconds for a whole request; after that it gets 504, and its work stops."""
    body_timeout_s: float = 10.0
    """Seconds to send the body (behind HAProxy, also the header); slower = 408."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "serve",
            *("max_body_bytes", "max_megapixels", "max_photos", "num_at_once", "max_connections"),
            *("timeout_s", "body_timeout_s"),
        )
        require(self.max_waiting >= 0, f"serve.max_waiting={self.max_waiting}: expected 0 or more")


@dataclass(kw_only=True)
class ServeSettings(LimitsConfig):
    """Where the service listens, who may ask, what it takes, and how it is spread over replicas."""

    host: str = "127.0.0.1"
    """Address to listen on; one that others can reach wants serve.token_file or serve.allow_anonymous=true."""
    port: int = 8000
    """Port to listen on."""
    token_file: str | None = None
    """File with the token that requests must carry (`Authorization: Bearer TOKEN`); null = none is asked for."""
    allow_anonymous: bool = False
    """Listen on another address than this machine's own without a token."""
    haproxy: bool = False
    """Scheduling: HAProxy takes the requests, not Ray Serve's own proxy; faster, opens ports, see docs/serving.md."""
    split: bool = False
    """Scheduling: door, network and shards are deployments of their own; false = all in one, faster on one machine."""
    num_replicas: int = 1
    """Scheduling: replicas of the network (with serve.split), or of everything."""
    max_replicas: int | None = None
    """Scheduling: grow from serve.num_replicas up to this many under load; null = their number is fixed."""
    num_doors: int = 1
    """Scheduling: with serve.split: replicas of the door, which take requests and decode photos."""
    num_shard_parts: int = 1
    """Scheduling: with serve.split: parts of an index, each in memory in other processes."""
    num_shard_replicas: int = 1
    """Scheduling: with serve.split: replicas of each part."""
    batch_wait_s: float = 0.0
    """With serve.split: photos within this time share a describing pass, which may change last bits; 0 = no."""
    refresh_s: float | None = None
    """Look for a newer generation of the indices this often; null = only on POST /v1/refresh."""
    drain_s: float = 30.0
    """Scheduling: on shutdown, seconds for the accepted requests to be answered."""
    keep_photos: str | None = None
    """Folder (path or URL) that keeps every photo asked about, named by its sha256; null = none is kept."""
    utm_epsg: int | None = None
    """EPSG code of the UTM zone of the indices' positions, where photo names do not give it."""

    def __post_init__(self) -> None:
        LimitsConfig.__post_init__(self)
        require_text(self, "serve.", "host", "token_file", "keep_photos")
        numbers = ("num_replicas", "max_replicas", "num_doors", "num_shard_parts", "num_shard_replicas")
        require_positive(self, "serve", *numbers, "refresh_s", "drain_s")
        require(0 < self.port < 65536, f"serve.port={self.port}: expected 1 to 65535")
        require(
            self.host in OWN_MACHINE or self.token_file is not None or self.allow_anonymous,
            f"serve.host={self.host}: others can reach that address; expected also serve.token_file=FILE, or "
            "serve.allow_anonymous=true",
        )
        require(
            not self.haproxy or self.host in HAPROXY_HOSTS,
            f"serve.host={self.host}: HAProxy asks replicas on its own node at 127.0.0.1; expected one of "
            f"{', '.join(HAPROXY_HOSTS)} with serve.haproxy=true",
        )
        require(
            self.max_replicas is None or self.max_replicas >= self.num_replicas,
            f"serve.max_replicas={self.max_replicas}: expected at least serve.num_replicas={self.num_replicas}",
        )
        require(0 <= self.batch_wait_s < math.inf, f"serve.batch_wait_s={self.batch_wait_s}: expected 0 or more")
        for name in ("num_doors", "num_shard_parts", "num_shard_replicas", "batch_wait_s"):
            value = getattr(self, name)
            require(
                self.split or value in (0.0, 1),
                f"serve.{name}={value}: in one deployment there are no others; expected also serve.split=true",
            )


@dataclass(kw_only=True)
class ServeConfig:
    """`pairvpr serve index.path=INDEX`: a photo in, a place out, over HTTP."""

    index: ServedIndexConfig = field(default_factory=ServedIndexConfig)
    indices: dict[str, str] = field(default_factory=dict)
    """Several indices of one network, {sf: URL, oslo: URL}, instead of index.path; requests choose one, or ask all."""
    model: ModelConfig = field(default_factory=ModelConfig)
    describe: DescribePassConfig = field(default_factory=DescribePassConfig)
    descriptor: DescriptorConfig = field(default_factory=DescriptorConfig)
    rerank: RerankConfig = field(default_factory=RerankConfig)
    serve: ServeSettings = field(default_factory=ServeSettings)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        given = "both are given" if self.indices else "neither is given"
        require(
            (self.index.path is not None) != bool(self.indices),
            f"index.path=INDEX and indices={{NAME: INDEX}}: {given}; expected one of them",
        )
        for name in self.indices:
            require(
                re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) is not None,
                f"indices: the name {name!r}; expected letters, digits, - and _",
            )
        for name, is_wrong, expected in (
            ("rerank.num_actors", self.rerank.num_actors is not None, "null, and serve.num_replicas"),
            ("index.num_actors", self.index.num_actors is not None, "null, and serve.num_shard_parts"),
            ("index.num_gpus_per_actor", self.index.num_gpus_per_actor != 0, "0, because a service searches on CPUs"),
            ("rerank.num_candidates", self.rerank.num_candidates == 0, "1 or more"),
            ("rerank.candidates", self.rerank.candidates is not None, "null, because candidates are searched for"),
            ("rerank.dense_features", self.rerank.dense_features is DenseFeatures.store, "cache or recompute"),
            ("rerank.report_candidates", self.rerank.report_candidates is not None, "null"),
        ):
            section, _, key = name.partition(".")
            require(not is_wrong, f"{name}={getattr(getattr(self, section), key)}: expected {expected}")

    @property
    def by_name(self) -> dict[str, str]:
        """The directories of all indices."""
        return dict(self.indices) if self.index.path is None else {DEFAULT_NAME: self.index.path}
