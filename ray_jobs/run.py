"""A run: its settings, and all checks of the user's input before a file is written or Ray starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pairvpr.config.schema import (
    BuildIndexConfig,
    DenseFeatures,
    DescribeBothConfig,
    EvaluateConfig,
    PlanConfig,
    QueryConfig,
    RerankConfig,
    UpdateIndexConfig,
)
from pairvpr.data import storage
from pairvpr.data.claim import FILE as SETTINGS_FILE
from pairvpr.data.claim import check_claim, differences
from pairvpr.data.descriptor_file import DescriptorFile, check_photos_of_file, open_descriptors
from pairvpr.data.manifest import Benchmark
from pairvpr.data.pairs import candidates_of, read_pairs
from pairvpr.distributed.dense import KEY as STORE_KEY
from pairvpr.distributed.dense import WantedStore, check_store
from pairvpr.errors import UserError
from pairvpr.evaluation.confidence import (
    Calibration,
    Judge,
    check_positions_of_votes,
    decision_of,
    unlike_the_network,
)
from pairvpr.index.generations import IndexManifest, read_images, read_manifest
from pairvpr.index.live import LivePhotos
from pairvpr.index.reader import live_ids, removed_ids
from pairvpr.index.settings import POSITIONS_SHA256, index_settings, position_settings
from pairvpr.models.weights import WeightsSource, find_weights
from pairvpr.retrieval.decision import Decision
from pairvpr.retrieval.dense_store import Layout
from pairvpr.retrieval.first_stage import FirstStage
from pairvpr.retrieval.rerank import SCORING
from pairvpr.retrieval.user_network import find_user_network

DescribingConfig = BuildIndexConfig | UpdateIndexConfig | QueryConfig | EvaluateConfig | PlanConfig


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
    weights: WeightsSource | None
    """Those of the network; None where nothing runs it."""
    first: FirstStage
    query_file: DescriptorFile | None = None
    """Where the queries' descriptors are, if they are in a file."""
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
            model=self.model_settings(),
            layout=Layout.of_model(self.config.model, settings.stored_as),
            database=self.benchmark.database,
            config=settings,
        )

    def index_settings(self) -> dict[str, Any]:
        """The settings that decide the bytes of the index, and of its photos' positions."""
        reduce_to = self.config.index.reduce_to if isinstance(self.config, EvaluateConfig) else None
        database = self.benchmark.database
        positions = position_settings(database) if database.has_positions else {}
        return index_settings(database, self.num_shards, self.first.settings, reduce_to) | positions

    def model_settings(self) -> dict[str, Any]:
        """The settings of the network that scores pairs."""
        assert self.weights is not None, "nothing asks a run without pairs"
        return self.config.model.settings() | {"weights_sha256": self.weights.sha256}

    def settings(self) -> dict[str, Any]:
        """The settings that decide the bytes of the predictions."""
        others = {} if self.weights is None else {"model": self.model_settings()}
        if self.query_file is not None:
            others["query_descriptors"] = self.query_file.settings()
        return self.index_settings() | {
            **others,
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


def as_earlier(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """An evaluation's settings as earlier versions wrote them, without positions."""
    return [{name: value for name, value in settings.items() if name != POSITIONS_SHA256}]


def check_claims(run: Run) -> None:
    check_claim(run.output, run.settings(), "output", earlier=as_earlier(run.settings()))
    if run.given is None:
        check_claim(run.index, run.index_settings(), "index.path", earlier=as_earlier(run.index_settings()))


def check_photos(run: Run) -> None:
    """Raise `UserError` unless a finished index holds the run's database, even if its settings.json is gone."""
    manifest = read_manifest(run.index)
    if manifest is None:
        return
    database = run.benchmark.database
    there = {
        "generation's updates": manifest.num_updates,
        "images_root": manifest.images_root,
        "num_images": manifest.num_images,
        "num_shards": len(manifest.shards),
        "descriptor_dim": manifest.described_dim,
    }
    here = {
        "generation's updates": 0,
        "images_root": database.root,
        "num_images": len(database),
        "num_shards": run.num_shards,
        "descriptor_dim": run.first.width,
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
    run.first.check_made(run.index, manifest)


def check_dense_store(run: Run) -> None:
    """Raise `UserError` if the store of dense features has other settings, or shares a directory with the run."""
    wanted = run.store
    if wanted is None:
        return
    if wanted.url in (run.output, run.index, storage.join(run.output, "queries")):
        raise UserError(f"{STORE_KEY}={wanted.url}: the run writes other files there; expected a separate directory")
    check_store(wanted)


def given_candidates(
    config: RerankConfig, benchmark: Benchmark, index: tuple[str, IndexManifest] | None = None
) -> GivenCandidates | None:
    """What rerank.candidates holds for the photos of a benchmark; None where it is not set. Raises `UserError`.

    Where the database is that of an `index` (its directory and generation), names stand for photos that it still has.
    """
    if config.candidates is None:
        return None
    about = config.candidates, "rerank.candidates"
    pairs, database, live = read_pairs(*about), benchmark.database, None
    if index is not None and index[1].num_updates:
        live = LivePhotos(database, removed_ids(*index)).by_preference(live_ids(*index))
    return GivenCandidates(candidates_of(pairs, *about, benchmark.queries, database, live), pairs.sha256)


def first_stage(config: DescribingConfig, num_candidates: int = 0) -> tuple[FirstStage, WeightsSource | None]:
    """What makes descriptors, and the weights of Pair-VPR's network; None where nothing runs that.

    It runs unless something else makes descriptors and no pair is scored. Raises `UserError`.
    """
    other = other_first_stage(config)
    if other is not None:
        return other, find_weights(config.model) if num_candidates else None
    weights = find_weights(config.model)
    return FirstStage.own(config.model, weights.sha256, config.describe), weights


def other_first_stage(config: DescribingConfig) -> FirstStage | None:
    """A file or a network of the user's, if one is given in place of Pair-VPR's network. Raises `UserError`."""
    file, module = config.describe.descriptors, config.descriptor.module
    if file is not None and module is not None:
        raise UserError(
            f"describe.descriptors={file}, descriptor.module={module}: both make descriptors; expected one of them"
        )
    if file is not None:
        return FirstStage.of_file(open_descriptors(file, "describe.descriptors"))
    if module is not None:
        return FirstStage.of_user_network(find_user_network(config.descriptor, config.model), config.describe)
    return None


def queries_of_file(config: DescribeBothConfig, first: FirstStage) -> DescriptorFile | None:
    """Where the queries' descriptors are, if those of the first stage are in a file. Raises `UserError`."""
    if first.file is None or config.query_descriptors is None:
        return first.file
    found = open_descriptors(config.query_descriptors, "describe.query_descriptors")
    if found.width != first.width:
        raise UserError(
            f"describe.query_descriptors={config.query_descriptors}: rows of {found.width} values, those of "
            f"describe.descriptors have {first.width}; expected the same network's"
        )
    return found


def check_descriptors(database: DescriptorFile, queries: DescriptorFile, benchmark: Benchmark) -> None:
    """Name the rows and photos of a benchmark that don't meet; raises `UserError` where the files can't be its."""
    if queries is database:
        check_photos_of_file(
            database, {"database": benchmark.database, "query": benchmark.queries}, "describe.descriptors"
        )
        return
    check_photos_of_file(database, {"database": benchmark.database}, "describe.descriptors")
    check_photos_of_file(queries, {"query": benchmark.queries}, "describe.query_descriptors")


def check_calibration(run: Run) -> None:
    """Raise `UserError` unless the run's network and first stage are the calibrated ones and votes have positions."""
    if run.calibration is None:
        return
    first_stage = unlike_the_network(run.first.settings, _reduced_to(run))
    run.calibration.check(str(run.config.rerank.calibration), run.model_settings(), first_stage)
    check_positions_of_votes(run.decision, run.benchmark.database.utm_m)


def _reduced_to(run: Run) -> int | None:
    """Values of a reduced descriptor in the index that is searched."""
    if isinstance(run.config, EvaluateConfig):
        return run.config.index.reduce_to
    return open_manifest(run.index, run.config.index.path).reduced_to


def open_manifest(index: str, given: str) -> IndexManifest:
    """The newest generation of an index. Raises `UserError`, naming the path as `given`, if there is none."""
    manifest = read_manifest(index)
    if manifest is None:
        raise UserError(f"index.path={given}: no finished index there; expected a directory with manifest.json")
    return manifest
