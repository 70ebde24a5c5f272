"""A run: its settings, and all checks of the user's input before a file is written or Ray starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import (
    DenseFeatures,
    EvaluateConfig,
    QueryConfig,
    RerankConfig,
)
from pairvpr.data import storage
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.claim import check_claim, differences
from pairvpr.data.manifest import Benchmark
from pairvpr.data.pairs import candidates_of, read_pairs
from pairvpr.distributed.dense import KEY as STORE_KEY
from pairvpr.distributed.dense import WantedStore, check_store
from pairvpr.errors import UserError
from pairvpr.evaluation.confidence import Calibration, Judge, check_positions_of_votes, decision_of
from pairvpr.index.generations import IndexManifest, check_model, read_images, read_manifest
from pairvpr.index.settings import index_settings
from pairvpr.models.weights import WeightsSource
from pairvpr.retrieval.decision import Decision
from pairvpr.retrieval.dense_store import Layout
from pairvpr.retrieval.rerank import SCORING


@dataclass(frozen=True)
class GivenCandidates:
    """What rerank.candidates holds: ids of each query's candidates, best first, and the sha256 of the file."""

    by_query: Mapping[int, NDArray[np.int64]]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One benchmark, checked and ready to run. `index` and `output` are absolute paths or URLs."""

    config: EvaluateConfig | QueryConfig
    benchmark: Benchmark
    weights: WeightsSource
    index: str
    num_shards: int
    output: str
    calibration: Calibration | None = None
    """The content of rerank.calibration."""
    given: GivenCandidates | None = None
    """Candidates that replace retrieval; the index is not searched then."""

    @property
    def judge(self) -> Judge | None:
        """Computes the confidence of answers."""
        found = self.calibration
        if found is None:
            return None
        fitted = self.decision or found
        return Judge(fitted.temperature, fitted.midpoint, self.config.rerank.not_in_map_below)

    @property
    def stop_margin(self) -> float | None:
        """The margin at which re-ranking of a query stops early."""
        fitted = self.decision or self.calibration
        return fitted.stop_margin if fitted and self.config.rerank.adaptive else None

    @property
    def decision(self) -> Decision | None:
        """The decision, if answers are ordered by more than the pair score."""
        return None if self.calibration is None else decision_of(self.config.rerank, self.calibration)

    @property
    def store(self) -> WantedStore | None:
        """The store of dense features that the run re-ranks from, if any."""
        settings = self.config.rerank
        if settings.dense_features is not DenseFeatures.store:
            return None
        return WantedStore(
            url=storage.absolute(settings.store_path or storage.join(self.output, "dense")),
            model=self.index_settings()["model"],
            layout=Layout.of_model(self.config.model, settings.stored_as),
            database=self.benchmark.database,
            config=settings,
        )

    def index_settings(self) -> dict[str, Any]:
        """The settings that decide the bytes of the index."""
        return index_settings(
            self.benchmark.database, self.num_shards, self.config.model, self.weights.sha256, self.config.describe
        )

    def settings(self) -> dict[str, Any]:
        """The settings that decide the bytes of the predictions."""
        return self.index_settings() | {
            "benchmark": {"name": self.benchmark.name} | self.benchmark.stamp(),
            "queries": {"root": self.benchmark.queries.root},
            "index": {"path": self.index, **self.config.index.settings()},
            "rerank": {
                name: getattr(self.config.rerank, name)
                for name in ("num_candidates", "batch_size", "queries_per_unit", "num_threads_per_actor")
            }
            | {"scoring": SCORING}
            | self._unusual_settings(),
        }

    def _decision_settings(self) -> dict[str, Any] | None:
        """The settings of the order of answers, if it is by more than the pair score."""
        found = self.decision
        if found is None:
            return None
        votes = found.votes and asdict(found.votes)
        return {
            "rule": str(self.config.rerank.decision),
            **asdict(found.weights),
            "votes": votes,
            "nothing": found.nothing,
        }

    def _unusual_settings(self) -> dict[str, Any]:
        """Settings that most runs leave at their defaults."""
        values = {
            "second_direction": self.config.rerank.second_direction,
            "candidates_sha256": self.given and self.given.sha256,
            "stored_as": None if self.store is None else str(self.config.rerank.stored_as),
            "temperature": self.judge and self.judge.temperature,
            "midpoint": self.judge and self.judge.midpoint,
            "decision": self._decision_settings(),
            "not_in_map_below": self.config.rerank.not_in_map_below,
            "stop_margin": self.stop_margin,
        }
        return {name: value for name, value in values.items() if value is not None}


def check_claims(run: Run) -> None:
    check_claim(run.output, run.settings(), "output")
    if run.given is None:
        check_claim(run.index, run.index_settings(), "index.path")


def check_photos(run: Run) -> None:
    """Raise `UserError` unless a finished index holds the run's database, even if its settings.json is gone."""
    manifest = read_manifest(run.index)
    if manifest is None:
        return
    database = run.benchmark.database
    there = {
        "generation's updates": len(manifest.images) - 1 + len(manifest.removed),
        "images_root": manifest.images_root,
        "num_images": manifest.num_images,
        "num_shards": len(manifest.shards),
        "descriptor_dim": manifest.descriptor_dim,
    }
    here = {
        "generation's updates": 0,
        "images_root": database.root,
        "num_images": len(database),
        "num_shards": run.num_shards,
        "descriptor_dim": run.config.model.descriptor_dim,
    }
    found = differences(there, here)
    if not found and not storage.exists(storage.join(run.index, SETTINGS_FILE)):
        names_there = read_images(run.index, manifest).paths_sha256
        found = differences({"paths_sha256": names_there}, {"paths_sha256": database.paths_sha256})
    if found:
        raise UserError(
            f"index.path={run.index}: the finished index there differs: {'; '.join(found)}; "
            "expected an index of this database, or another directory"
        )


def check_index_model(run: Run) -> None:
    """Raise `UserError` unless the run's model made a finished index."""
    manifest = read_manifest(run.index)
    if manifest is None:
        return
    check_model(
        run.index,
        manifest,
        name=run.config.model.name,
        weights_sha256=run.weights.sha256,
        model=run.index_settings()["model"],
    )


def check_dense_store(run: Run) -> None:
    """Raise `UserError` if the store of dense features has other settings, or shares a directory with the run."""
    wanted = run.store
    if wanted is None:
        return
    if wanted.url in (run.output, run.index, storage.join(run.output, "queries")):
        raise UserError(f"{STORE_KEY}={wanted.url}: the run writes other files there; expected a separate directory")
    check_store(wanted)


def given_candidates(config: RerankConfig, benchmark: Benchmark) -> GivenCandidates | None:
    """What rerank.candidates holds for the photos of a benchmark; None where it is not set. Raises `UserError`."""
    if config.candidates is None:
        return None
    about = config.candidates, "rerank.candidates"
    pairs = read_pairs(*about)
    return GivenCandidates(candidates_of(pairs, *about, benchmark.queries, benchmark.database), pairs.sha256)


def check_calibration(run: Run) -> None:
    """Raise `UserError` unless the run's network is the calibrated one and votes have positions."""
    if run.calibration is None:
        return
    run.calibration.check(str(run.config.rerank.calibration), run.index_settings()["model"])
    check_positions_of_votes(run.decision, run.benchmark.database.utm_m)


def open_manifest(index: str, given: str) -> IndexManifest:
    """The newest generation of an index. Raises `UserError`, naming the path as `given`, if there is none."""
    manifest = read_manifest(index)
    if manifest is None:
        raise UserError(f"index.path={given}: no finished index there; expected a directory with manifest.json")
    return manifest
