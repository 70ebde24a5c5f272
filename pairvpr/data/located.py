"""Photos with positions from the source that a job's settings name."""

from __future__ import annotations

from pairvpr.config.benchmark_schema import PositionSource
from pairvpr.config.schema import PositionsConfig
from pairvpr.data.manifest import Manifest
from pairvpr.data.positions import PositionsTable, positions_from_exif, positions_from_names, positions_from_tables
from pairvpr.data.problems import Problems
from pairvpr.data.utm import UtmZone


def located(photos: Manifest, config: PositionsConfig, key: str, zone: UtmZone | None = None) -> Manifest:
    """The photos with positions from the source in `config`, without those that have no position.

    `zone`, if known, is the UTM zone to compare them in; names of other zones are projected into it.
    Raises `UserError` for the first photo, row or file that can't be used.
    """
    if config.positions is None:
        return photos
    problems = Problems()
    match config.positions:
        case PositionSource.names:
            placed = positions_from_names(photos, key, problems, zone)
        case PositionSource.table:
            table = PositionsTable("positions_table", str(config.positions_table), photos)
            placed = positions_from_tables([table], config.columns, "columns", problems)[0]
        case PositionSource.exif:
            placed = positions_from_exif([photos], problems)[0]
    problems.raise_if_any()
    return placed
