"""`pairvpr build_index database=DIR output=INDEX`: describe a folder of photos and index it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import ray

from pairvpr.cli import run_job
from pairvpr.config.compose import load
from pairvpr.config.schema import BuildIndexConfig
from pairvpr.data import storage
from pairvpr.data.claim import check_claim, check_writable, claim
from pairvpr.data.descriptor_file import check_photos_of_file
from pairvpr.data.located import located
from pairvpr.data.manifest import folder_manifest
from pairvpr.distributed.network import ModelSource
from pairvpr.distributed.runtime import ray_session
from pairvpr.index import choose
from pairvpr.index.settings import index_settings, position_settings
from pairvpr.models.weights import announce, load_weights
from pairvpr.secrets import without_secrets
from pairvpr.status import published
from pairvpr.terminal import say
from ray_jobs.run import first_stage
from ray_jobs.steps import about_generation, ensure_index


def main(arguments: Sequence[str]) -> None:
    """One index."""
    print(without_secrets(f"index: {build_index(load(BuildIndexConfig, arguments))}"))


def build_index(config: BuildIndexConfig) -> str:
    """Describe and index a folder of photos; returns the index directory."""
    database = located(folder_manifest(config.database, "database"), config, "database")
    directory = storage.absolute(config.output)
    check_writable(directory, "output")
    num_shards = config.index.num_shards or choose.default_num_shards(len(database))
    first, source = first_stage(config)
    if first.file is not None:
        check_photos_of_file(first.file, {"database": database}, "describe.descriptors")
    settings = index_settings(database, num_shards, first.settings, config.index.reduce_to)
    if config.positions is not None:
        settings |= position_settings(database)
    check_claim(directory, settings, "output")
    weights = source and load_weights(config.model, source)
    if weights is not None:
        announce(config.model, weights)
    claim(directory, settings, "output")
    with published(directory, "build_index"), ray_session(config.cluster):
        network = weights and ModelSource(config.model, ray.put(weights))
        manifest = ensure_index(database, directory, num_shards, first, network, config)
    say(about_generation(manifest))
    return directory


if __name__ == "__main__":
    sys.exit(run_job("build_index"))
