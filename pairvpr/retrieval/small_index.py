"""An index of a small folder, built in this process; byte-identical to that of the job build_index.

All descriptors are in memory at once, and a killed process starts over.
"""

from __future__ import annotations

import time

import numpy as np
import psutil

from pairvpr.config.schema import BuildConfig, DescribeConfig, PositionsConfig
from pairvpr.data import stamps, storage
from pairvpr.data.claim import check_claim, check_writable, claim
from pairvpr.data.located import located
from pairvpr.data.manifest import Manifest, folder_manifest
from pairvpr.errors import UserError
from pairvpr.index import choose, descriptor_shards, make
from pairvpr.index.generations import IndexManifest, commit, read_manifest
from pairvpr.index.settings import index_settings, position_settings
from pairvpr.retrieval.describe import Describer
from pairvpr.retrieval.first_stage import FirstStage
from pairvpr.retrieval.pipeline import describe
from pairvpr.retrieval.user_network import UserDescriber

SHARE_OF_MEMORY = 0.5
"""Share of this machine's memory that an index may take by default."""


def build_small_index(
    photos: str,
    directory: str,
    describer: Describer | UserDescriber,
    first: FirstStage,
    config: DescribeConfig,
    index: BuildConfig,
    positions: PositionsConfig,
) -> IndexManifest:
    """Build the index of a folder of photos (path or URL), or keep a finished one; `describer` runs `first`.

    Raises `UserError` for a folder without readable photos, and if `directory` was made with other settings.
    """
    database = located(folder_manifest(photos, "photos"), positions, "photos")
    check_writable(directory, "index")
    num_shards = index.num_shards or choose.default_num_shards(len(database))
    settings = index_settings(database, num_shards, first.settings)
    if positions.positions is not None:
        settings |= position_settings(database)
    check_claim(directory, settings, "index")
    finished = read_manifest(directory)
    if finished is not None:
        if not make.is_wanted(finished, index):
            raise UserError(
                f"index={directory}: the finished index there is of kind {finished.kind}; expected another directory"
            )
        stamps.check_unchanged(database, directory)
        return finished
    claim(directory, settings, "index")
    _describe(database, directory, num_shards, describer, config)
    model = {"name": first.name, "weights_sha256": first.weights_sha256}
    draft = make.first_generation(directory, database, num_shards, model, first.width)
    budget_bytes = SHARE_OF_MEMORY * psutil.virtual_memory().total
    if index.memory_budget_gib is not None:
        budget_bytes = index.memory_budget_gib * choose.GIB
    manifest = make.next_generation(directory, draft, index, budget_bytes, make.LocalRunner())
    commit(directory, manifest)
    return manifest


def _describe(
    database: Manifest, directory: str, num_shards: int, describer: Describer | UserDescriber, config: DescribeConfig
) -> None:
    database.write(storage.join(directory, "images.parquet"))
    stamps.write(directory, stamps.stamps(database))
    started_s = time.perf_counter()
    described = describe(database, describer, config)
    if not len(described.ids):
        why = described.rejected[0]
        raise UserError(f"photos={database.root}: none of the {len(database)} photos can be read, the first: {why}")
    seconds = (time.perf_counter() - started_s) / num_shards
    shards = []
    for shard in descriptor_shards.shard_ranges(len(database), num_shards):
        first, stop = np.searchsorted(described.ids, [shard.first_id, shard.stop_id])
        rejected, remarks = (
            {image_id: text for image_id, text in texts.items() if shard.first_id <= image_id < shard.stop_id}
            for texts in (described.rejected, described.remarks)
        )
        if remarks:
            descriptor_shards.write_shard_remarks(directory, shard.shard, remarks)
        shards.append(
            descriptor_shards.write_shard_description(
                directory,
                shard.shard,
                described.ids[first:stop],
                described.descriptors[first:stop],
                first_id=shard.first_id,
                count=shard.count,
                rejected=rejected,
                seconds=seconds,
            )
        )
    descriptor_shards.finish_description(directory, database, shards)
