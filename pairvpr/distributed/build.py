"""The job build_index, and what evaluations share with it: describe a database and index it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from pairvpr.config.benchmark_schema import FoldersConfig, PositionSource
from pairvpr.config.schema import BuildConfig, BuildIndexConfig, DescribeConfig, ModelConfig, PositionsConfig
from pairvpr.data import storage
from pairvpr.data.claim import check_claim, check_writable, claim
from pairvpr.data.manifest import Manifest, folder_manifest
from pairvpr.data.positions import positions_from_exif, positions_from_names, positions_from_tables
from pairvpr.data.problems import Problems
from pairvpr.distributed.describe import Description, describe
from pairvpr.distributed.index import OnTheCluster
from pairvpr.distributed.progress import say
from pairvpr.distributed.room import node_rooms, room
from pairvpr.distributed.runtime import ModelSource, cluster_memory_bytes, ray_session
from pairvpr.errors import UserError
from pairvpr.index import choose, make
from pairvpr.index.manifest import IndexManifest, commit, read_manifest
from pairvpr.index.plan import check_fits, plan_index
from pairvpr.models.weights import NOT_LOADED, Weights, announce, load_weights

SHARE_OF_MEMORY = 0.5
"""Of the cluster, for an index that is given no budget."""


def index_settings(
    database: Manifest, num_shards: int, model: ModelConfig, weights: Weights, config: DescribeConfig
) -> dict[str, Any]:
    """What decides the descriptors of an index, in plain values; kinds of index can be built from them at any time."""
    return {
        "model": model.settings() | {"weights_sha256": weights.sha256},
        "describe": {"batch_size": config.batch_size, "num_threads_per_actor": config.num_threads_per_actor},
        "database": {
            "root": database.root,
            "num_images": len(database),
            "paths_sha256": database.paths_sha256,
        },
        "index_num_shards": num_shards,
    }


def make_index(
    database: Manifest,
    directory: str,
    num_shards: int,
    source: ModelSource,
    config: DescribeConfig,
    index: BuildConfig,
    settings: dict[str, Any],
) -> IndexManifest:
    """Describe the database and build its index in a directory claimed with `settings`; what is finished is kept."""
    finished = read_manifest(directory)
    if finished is not None and make.is_wanted(finished, index):
        say("index: finished earlier, skipped")
        return finished
    if finished is not None and not storage.has_atomic_creation(directory):
        raise UserError(
            f"{directory}: the finished index is {finished.kind} ({finished.factory}); this store can't tell "
            "two writers apart: expected python -m ray_jobs.update_index index.kind=... single_writer=true"
        )
    budget_bytes = memory_budget_bytes(index)
    plan = plan_index(len(database), source.config, replace(index, num_shards=num_shards), budget_bytes=budget_bytes)
    check_fits(plan, room(directory), index)
    describe(Description(database, directory, num_shards, source, config), "database", needs_a_readable_photo=True)
    if finished is None:
        model = {"name": settings["model"]["name"], "weights_sha256": settings["model"]["weights_sha256"]}
        draft = make.first_generation(directory, database, num_shards, model, source.config.descriptor_dim)
    else:
        draft = replace(finished, generation=finished.generation + 1)
    manifest = make.make_index(directory, draft, index, budget_bytes, OnTheCluster())
    commit(directory, manifest)
    return manifest


def memory_budget_bytes(config: BuildConfig) -> float:
    """What all shards may take together in search."""
    if config.memory_budget_gib is not None:
        return config.memory_budget_gib * choose.GIB
    if not node_rooms():
        raise UserError(
            "the cluster has no memory yet, it scales up when asked: give index.memory_budget_gib, what all shards of "
            "the index may take together in search"
        )
    return SHARE_OF_MEMORY * cluster_memory_bytes()


def build(config: BuildIndexConfig) -> str:
    """Describe and index a folder of photos; returns the index directory."""
    database = located(folder_manifest(config.database, "database"), config, "database")
    directory = storage.absolute(config.output)
    check_writable(directory, "output")
    num_shards = config.index.num_shards or choose.default_num_shards(len(database))
    settings = index_settings(database, num_shards, config.model, NOT_LOADED, config.describe)
    if config.positions is not None:
        places = database.utm_m.tobytes() + database.heading_deg.tobytes()
        settings["positions_sha256"] = hashlib.sha256(places).hexdigest()
    check_claim(directory, settings, "output", ("model.weights_sha256",))
    weights = load_weights(config.model)
    settings |= index_settings(database, num_shards, config.model, weights, config.describe)
    check_claim(directory, settings, "output")
    announce(config.model, weights)
    claim(directory, settings, "output")
    with ray_session(config.cluster):
        source = ModelSource(config.model, ray.put(weights))
        manifest = make_index(database, directory, num_shards, source, config.describe, config.index, settings)
    say(summary(manifest))
    return directory


def summary(manifest: IndexManifest) -> str:
    """One line on a generation."""
    recall = "exact" if manifest.measured is None else f"recall {manifest.measured['recall']} of the exact nearest"
    return (
        f"index: generation {manifest.generation}, {manifest.num_live:,} photos in {len(manifest.shards)} shards, "
        f"{manifest.kind} ({manifest.factory}), {recall}"
    )


def located(photos: Manifest, config: PositionsConfig, key: str) -> Manifest:
    """The photos with positions from where `config` says they are known; those without one take no part.

    Raises `UserError` for the first photo, row or file that can't be used.
    """
    if config.positions is None:
        return photos
    problems, nobody = Problems(), photos.only(np.empty(0, np.int64))
    folders = FoldersConfig(
        name="index",
        database=photos.root,
        queries="-",
        positions=config.positions,
        database_table=config.positions_table,
        columns=config.columns,
    )
    try:
        match config.positions:
            case PositionSource.names:
                placed = positions_from_names(photos, key, problems)
            case PositionSource.table:
                placed = positions_from_tables(folders, photos, nobody, problems)[0]
            case PositionSource.exif:
                placed = positions_from_exif(folders, photos, nobody, problems)[0]
        problems.raise_if_any()
    except UserError as error:
        text = str(error).replace("benchmark.database_table", "positions_table").replace("benchmark.columns", "columns")
        raise UserError(text) from error
    return placed
