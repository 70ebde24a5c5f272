"""Photos with positions from where the settings of a job say they are known."""

from __future__ import annotations

import numpy as np

from pairvpr.config.benchmark_schema import FoldersConfig, PositionSource
from pairvpr.config.schema import PositionsConfig
from pairvpr.data.manifest import Manifest
from pairvpr.data.positions import positions_from_exif, positions_from_names, positions_from_tables
from pairvpr.data.problems import Problems
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError


def located(photos: Manifest, config: PositionsConfig, key: str, zone: UtmZone | None = None) -> Manifest:
    """The photos with positions from where `config` says they are known; those without one take no part.

    `zone` is that of the metres they are compared with, where it is known: names of other zones are projected into it.
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
                placed = positions_from_names(photos, key, problems, zone)
            case PositionSource.table:
                placed = positions_from_tables(folders, photos, nobody, problems)[0]
            case PositionSource.exif:
                placed = positions_from_exif(folders, photos, nobody, problems)[0]
        problems.raise_if_any()
    except UserError as error:
        text = str(error).replace("benchmark.database_table", "positions_table").replace("benchmark.columns", "columns")
        raise UserError(text) from error
    return placed
