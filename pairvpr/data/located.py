"""Photos with positions from the source that a job's settings name."""

from __future__ import annotations

from pairvpr.config.benchmark_schema import PositionSource
from pairvpr.config.schema import PositionsConfig
from pairvpr.data.manifest import Manifest
from pairvpr.data.positions import (
    PositionsTable,
    are_from_names,
    positions_from_exif,
    positions_from_names,
    positions_from_tables,
    zone_of_metres,
    zone_of_names,
)
from pairvpr.data.problems import Problems
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError
from pairvpr.terminal import say


def located(photos: Manifest, config: PositionsConfig, key: str, index: Manifest | None = None) -> Manifest:
    """The photos with positions from the source in `config`, without those that have no position.

    `index`, if given, are photos of an index: the positions are then in the UTM zone of its metres. A table of metres
    must be in that zone; all other sources are projected into it.

    Raises `UserError` for the first photo, row or file that can't be used, and for degrees if the zone of the index's
    metres is unknown.
    """
    if config.positions is None:
        return photos
    problems, zone = Problems(), None
    match config.positions:
        case PositionSource.names:
            zone = None if index is None else _zone_for_names(index, photos, key)
            placed = positions_from_names(photos, key, problems, zone)
        case PositionSource.table:
            zone = None if index is None else zone_of_metres(index)
            table = PositionsTable("positions_table", str(config.positions_table), photos)
            placed = positions_from_tables([table], config.columns, "columns", problems, zone)[0]
        case PositionSource.exif:
            zone = None if index is None else zone_of_metres(index)
            placed = positions_from_exif([photos], problems, zone)[0]
    problems.raise_if_any()
    if index is None or not index.has_positions:
        return placed
    if zone is None and placed.zone is not None:
        raise UserError(
            f"positions={config.positions}: latitude and longitude, but the UTM zone of the index's metres is unknown; "
            "expected a table of metres in that zone"
        )
    return placed.in_zone(index.zone)


def _zone_for_names(index: Manifest, photos: Manifest, key: str) -> UtmZone | None:
    """The zone of an index's metres, or of its names if it has no metres.

    Raises `UserError` if it is unknown and the photos' names state one.
    """
    if not index.has_positions:
        return zone_of_names(index)
    zone, stated = zone_of_metres(index), zone_of_names(photos)
    if zone is None and stated is not None:
        raise UserError(
            f"{key}: names state UTM zone {stated.number}, but the zone of the index's metres is unknown; expected a "
            "table of metres in that zone"
        )
    return zone


def located_as_in(index: Manifest, photos: Manifest, config: PositionsConfig, key: str, given: str) -> Manifest:
    """`located` in an index; where `config` has no source and the index has positions, from the source of these.

    An index does not record its source, but positions that all are those of the photos' names come from there.
    Raises `UserError` as `located` does, and, naming the setting `key` and what it was `given`, where the source is
    another one or the photos' names have no coordinates.
    """
    if config.positions is not None or not index.has_positions:
        return located(photos, config, key, index)
    zone = _zone_for_names(index, photos, key)
    placed = positions_from_names(photos, key, Problems(), zone)
    if len(placed) < len(photos) or not are_from_names(index, zone):
        raise UserError(
            f"{key}={given}: the index knows where its photos were taken, and not where these were; expected "
            "positions=names, positions=exif, positions=table with positions_table=FILE, or without_positions=true"
        )
    say(f"{key}: positions are read from the photos' names, as those of the index are")
    return placed.in_zone(index.zone)
