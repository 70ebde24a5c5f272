"""Positions of photos: from `@` names, from tables, or from GPS entries in EXIF.

All sources give metres in one UTM zone for the whole benchmark, so that distances between photos are distances between
coordinates, even across a border of zones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.config.benchmark_schema import PositionColumns
from pairvpr.data import storage, utm
from pairvpr.data.exif import NUM_HEAD_BYTES, GpsError, GpsPosition, gps_position
from pairvpr.data.manifest import Manifest
from pairvpr.data.problems import Problems
from pairvpr.data.spellings import NO_PHOTO, no_photo_text
from pairvpr.data.tables import Rows, TableFile, find_photos
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError

pc: Any = compute  # its functions are generated at run time, so their types are unknown

_NUMBER = r"-?\d+(?:\.\d+)?"
_NAME = (
    rf"(?s)^(?:.*/)?@(?P<east>{_NUMBER})@(?P<north>{_NUMBER})@"
    rf"(?:(?:[^/@]*@){{6}}(?P<heading>{_NUMBER})@)?[^/]*$"
)

_ZONE = r"(?s)^(?:.*/)?@[^/@]*@[^/@]*@0?(?P<zone>[1-9]|[1-5]\d|60)@(?P<band>[C-HJ-NP-Xc-hj-np-x])@[^/]*$"

_PAIR = r"(?P<first>-?\d+(?:\.\d+)?)@(?P<second>-?\d+(?:\.\d+)?)"
_METRES = rf"(?s)^(?:.*/)?@{_PAIR}@[^/]*$"
_DEGREES = rf"(?s)^(?:.*/)?@[^/@]*@[^/@]*@[^/@]*@[^/@]*@{_PAIR}@[^/]*$"
_SAME_M = 1e-3
_METRES_AGREE_M = 1.0
"""How far a photo's metres may lie from those in its name, if these are where they come from."""
_DEGREES_AGREE_M = 50.0
"""How far a name's degrees may lie from its metres, both of which are rounded."""

_NUM_READERS = 16
_PHOTOS_AT_A_TIME = 256

ZONE_COLUMNS = ("utm_zone", "utm_zone_number", "utm_zone_letter", "zone", "hemisphere")
"""Columns of a table that name the UTM zone of its metres."""
_HEMISPHERES = {"N": False, "NORTH": False, "NORTHERN": False, "S": True, "SOUTH": True, "SOUTHERN": True}
_ZONE_CELL = re.compile(r"0?(?P<number>[1-9]|[1-5][0-9]|60)(?:[.]0+)?\s*(?P<letter>[C-HJ-NP-X]?)")
_EPSG_CELL = re.compile(r"(?:EPSG:)?32(?P<half>[67])(?P<number>0[1-9]|[1-5][0-9]|60)")
_BANDS, _SOUTHERN_BANDS = "CDEFGHJKLMNPQRSTUVWX", "CDEFGHJKLM"
_LIMITS_DEG = (90.0, 180.0)
_MOST_UTM_M = 1e8  # farther than any point on Earth is from a zone's origin


def positions_from_names(photos: Manifest, key: str, problems: Problems, zone: UtmZone | None = None) -> Manifest:
    """The photos named `@utm_east@utm_north@...`, with their UTM position and, if field 9 gives it, heading.

    Coordinates are in `zone`, by default the zone of most names; photos of other zones are projected into it. Any other
    name is a problem, reported with the setting `key` of the folder.
    """
    fields = pc.extract_regex(photos.path_column, _NAME)
    east, north, heading = (_field(fields, name) for name in ("east", "north", "heading"))
    has_position = (np.abs(east) <= _MOST_UTM_M) & (np.abs(north) <= _MOST_UTM_M)  # NaN is not
    for image_id in np.flatnonzero(~has_position).tolist():
        problems.add(
            f"{key}: {photos.path(image_id)} has no coordinates in its name; "
            "expected @utm_east@utm_north@... for a radius"
        )
    utm_m, heading_deg = np.stack([east, north], axis=1), heading % 360.0
    has_position &= _projected(utm_m, has_position, zone, photos, key, problems)
    if has_position.all():
        return photos.with_positions(utm_m, heading_deg)
    return photos.only(np.flatnonzero(has_position)).with_positions(utm_m[has_position], heading_deg[has_position])


def zone_of_names(photos: Manifest) -> UtmZone | None:
    """The zone of most of the photos' names; None if no name gives one."""
    return _most_stated(_stated_zones(photos))


def are_from_names(photos: Manifest, zone: UtmZone | None) -> bool:
    """Whether all known positions and headings are those that the photos' names state, in `zone` if it is given.

    False where no position is known.
    """
    known = photos.take(np.flatnonzero(~np.isnan(photos.utm_m[:, 0])))
    named = positions_from_names(known, "", Problems(), zone)
    return (
        len(named) == len(known) > 0
        and np.allclose(named.utm_m, known.utm_m, rtol=0.0, atol=_SAME_M)
        and np.allclose(named.heading_deg, known.heading_deg, equal_nan=True)
    )


def zone_of_metres(photos: Manifest) -> UtmZone | None:
    """The UTM zone of the photos' metres: as it was recorded, or as the names of most located photos state it.

    None where neither is known, and where these are not the names' positions: most metres are others, or a name's
    degrees are another place.
    """
    if photos.zone is not None:
        return photos.zone
    rows = np.flatnonzero(~np.isnan(photos.utm_m[:, 0]))
    located = photos.take(rows)
    zone, apart_m = zone_of_names(located), _apart_m(located, _METRES, lambda metres: metres)
    if zone is None or not len(apart_m) or np.median(apart_m) > _METRES_AGREE_M:
        return None
    apart_m = _apart_m(located, _DEGREES, lambda degrees: utm.to_utm(degrees[:, 0], degrees[:, 1], zone))
    return None if apart_m.max(initial=0.0) > _DEGREES_AGREE_M else zone


def _apart_m(
    photos: Manifest, pattern: str, to_metres: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float64]:
    """(n,) how far photos are from what their names say in the groups `first` and `second`, of names that do."""
    found = pc.extract_regex(photos.path_column, pattern)
    rows = np.flatnonzero(found.is_valid().to_numpy())
    first, second = (pc.struct_field(found.take(rows), name).cast("float64").to_numpy() for name in ("first", "second"))
    return np.abs(to_metres(np.stack([first, second], axis=1)) - photos.utm_m[rows]).max(axis=1)


_NOT_STATED = 0


def _stated_zones(photos: Manifest) -> NDArray[np.int64]:
    """(n,) the zone in each photo's name: twice its number, plus one in the south; 0 without a zone.

    Bands C to M are south of the equator, N to X north of it.
    """
    fields = pc.extract_regex(photos.path_column, _ZONE)
    number = pc.struct_field(fields, "zone").cast(pa.int64())
    is_south = pc.less(pc.utf8_upper(pc.struct_field(fields, "band")), "N").cast(pa.int64())
    return pc.fill_null(pc.add(pc.multiply(number, 2), is_south), _NOT_STATED).to_numpy()


def _most_stated(zones: NDArray[np.int64]) -> UtmZone | None:
    found, counts = np.unique(zones[zones != _NOT_STATED], return_counts=True)
    return _zone(int(found[counts.argmax()])) if len(found) else None


def _zone(stated: int) -> UtmZone:
    return UtmZone(stated // 2, south=bool(stated % 2))


def _projected(
    utm_m: NDArray[np.float64],
    has_position: NDArray[np.bool_],
    zone: UtmZone | None,
    photos: Manifest,
    key: str,
    problems: Problems,
) -> NDArray[np.bool_]:
    """Project the positions (n, 2) of other zones into `zone`, in place; returns (n,) which ones can be compared.

    Problems are names without a zone among names of several zones, and positions far from the zone.
    """
    zones = _stated_zones(photos)
    target = zone or _most_stated(zones)
    is_fine = np.ones(len(zones), np.bool_)
    others = [stated for stated in np.unique(zones).tolist() if stated != _NOT_STATED and _zone(stated) != target]
    if target is None or not others:
        return is_fine
    for stated in others:
        rows = np.flatnonzero(zones == stated)
        with np.errstate(all="ignore"):  # coordinates outside this zone
            degrees = utm.to_degrees(utm_m[rows], _zone(stated))
            utm_m[rows] = utm.to_utm(degrees[:, 0], degrees[:, 1], target)
            is_fine[rows] = utm.is_near(utm_m[rows])
    for i in np.flatnonzero(has_position & ~is_fine).tolist():
        problems.add(
            f"{key}: {photos.path(i)} is too far from UTM zone {target.number}, where the database lies; expected "
            f"photos within {utm.MOST_EAST_M / 1000:.0f} km of longitude {target.central_meridian_deg:g}"
        )
    is_unstated = zones == _NOT_STATED
    for i in np.flatnonzero(has_position & is_unstated).tolist():
        problems.add(f"{key}: {photos.path(i)} states no UTM zone, and other names state several; expected it in all")
    return is_fine & ~is_unstated


def _field(fields: pa.ChunkedArray, name: str) -> NDArray[np.float64]:
    texts = pc.struct_field(fields, name)
    return pc.if_else(pc.equal(texts, ""), None, texts).cast(pa.float64()).to_numpy()


@dataclass(frozen=True, eq=False)
class PositionsTable:
    """A table (path or URL) with the positions of `photos`, and the setting that names it."""

    key: str
    url: str
    photos: Manifest
    have_keys: bool = False
    """Whether rows may name a photo by its key (`find_photos`)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Located:
    """Photos with the positions of their source: (n, 2) UTM in metres, or latitude, longitude in degrees."""

    photos: Manifest
    coordinates: NDArray[np.float64]
    heading_deg: NDArray[np.float64]
    where: Callable[[int], str]
    """The name of photo i's source in messages."""


def positions_from_tables(
    sources: Sequence[PositionsTable],
    columns: PositionColumns,
    columns_key: str,
    problems: Problems,
    zone: UtmZone | None = None,
) -> list[Manifest]:
    """The photos that the tables list, with their positions; the first table is the database's.

    Degrees become metres of `zone`, by default of the zone that holds most of the database. Unreadable tables and
    unusable rows are problems; raises `UserError` if too little is left. `columns_key` is the setting that renames
    columns.
    """
    files = dict[str, TableFile]()
    for source in sources:
        with problems.gathered():
            files[source.key] = _open(source, columns, columns_key)
    pair = _common_pair(list(files.values()), columns)
    located = list[_Located]()
    for source in sources:
        if source.key in files:
            with problems.gathered():
                located.append(_read_table(files[source.key], columns, pair, source, problems))
    if len(located) < len(sources):
        problems.raise_if_any()
    is_utm = pair == _pairs(columns)[0]
    if is_utm:
        _check_one_zone(list(files.values()), zone)
    return [_in_utm(part) for part in located] if is_utm else _in_one_zone(located, problems, zone)


def positions_from_exif(parts: Sequence[Manifest], problems: Problems, zone: UtmZone | None = None) -> list[Manifest]:
    """The photos with the positions and headings (from true north) of their EXIF; database first.

    Metres are of `zone`, by default of the zone that holds most of the database. A photo without a position is a
    problem; raises `UserError` if no database photo has one.
    """
    return _in_one_zone([_read_exif(photos, problems) for photos in parts], problems, zone)


def _in_utm(located: _Located) -> Manifest:
    return located.photos.with_positions(located.coordinates, located.heading_deg)


def _in_one_zone(located: list[_Located], problems: Problems, zone: UtmZone | None) -> list[Manifest]:
    """Convert database (and queries) from degrees to metres in `zone`, or that which holds most of the database."""
    database = located[0]
    if not len(database.photos):
        problems.raise_if_any()
    zone = zone or utm.zone_of(database.coordinates[:, 0], database.coordinates[:, 1])
    placed = []
    for part in located:
        utm_m = utm.to_utm(part.coordinates[:, 0], part.coordinates[:, 1], zone)
        is_near = utm.is_near(utm_m)
        for i in np.flatnonzero(~is_near).tolist():
            latitude_deg, longitude_deg = part.coordinates[i]
            problems.add(
                f"{part.where(i)}: latitude {latitude_deg:g}, longitude {longitude_deg:g} is too far from UTM "
                f"zone {zone.number}, where the database lies; expected photos within "
                f"{utm.MOST_EAST_M / 1000:.0f} km of longitude {zone.central_meridian_deg:g}"
            )
        near = np.flatnonzero(is_near)
        placed.append(part.photos.only(near).with_positions(utm_m[near], part.heading_deg[near], zone))
    return placed


def _pairs(columns: PositionColumns) -> list[tuple[str, str]]:
    """The columns that can hold coordinates, the preferred ones first."""
    return [(columns.utm_east, columns.utm_north), (columns.latitude, columns.longitude)]


def _open(source: PositionsTable, columns: PositionColumns, columns_key: str) -> TableFile:
    file = TableFile.open(source.url, source.key)
    if not file.has(columns.path) or not any(file.has(*pair) for pair in _pairs(columns)):
        either = " or ".join(",".join(pair) for pair in _pairs(columns))
        raise UserError(
            f"{source.url}: its columns are {','.join(file.names)}; expected {columns.path} and either {either} "
            f"({columns_key}.* gives them other names)"
        )
    return file


def _common_pair(files: list[TableFile], columns: PositionColumns) -> tuple[str, str]:
    """The coordinate columns to read from each table."""
    for pair in _pairs(columns):
        if all(file.has(*pair) for file in files):
            return pair
    utm_pair, degrees_pair = (",".join(pair) for pair in _pairs(columns))
    raise UserError(
        f"{files[0].url} and {files[1].url}: one has {utm_pair}, the other {degrees_pair}; expected the same in both, "
        "because the UTM zone of the former is unknown"
    )


@dataclass(frozen=True)
class _ZoneCell:
    """What a cell states of a UTM zone. `letter` is a band, but N or S may also be the hemisphere."""

    number: int | None = None
    letter: str = ""
    south: bool | None = None
    other: str = ""
    """A text of another form, which is compared as it is."""

    @classmethod
    def of(cls, column: str, text: str) -> _ZoneCell:
        """Such as `33`, `33U`, `33.0`, `EPSG:32633`; `U`; `north`."""
        text = text.strip().upper()
        if match := _EPSG_CELL.fullmatch(text):
            return cls(number=int(match["number"]), south=match["half"] == "7")
        if column == "hemisphere" and text in _HEMISPHERES:
            return cls(south=_HEMISPHERES[text])
        if match := _ZONE_CELL.fullmatch(text):
            return cls(number=int(match["number"]), letter=match["letter"])
        return cls(letter=text) if text in set(_BANDS) else cls(other=text)


def _check_one_zone(files: list[TableFile], zone: UtmZone | None) -> None:
    """Raise `UserError` if the tables state several zones, or another one than `zone`, that of the index.

    Metres of different zones can't be compared.
    """
    texts = {
        name: {
            text
            for file in files
            if file.has(name)
            for text in file.read([name], Problems()).texts(name).unique().drop_null().to_pylist()
            if text.strip()
        }
        for name in ZONE_COLUMNS
    }
    cells = {name: {_ZoneCell.of(name, text) for text in its} for name, its in texts.items()}
    stated = set[_ZoneCell]().union(*cells.values())
    numbers, letters = {cell.number for cell in stated} - {None}, {cell.letter for cell in stated} - {""}
    souths = {cell.south for cell in stated} - {None} | {letter in _SOUTHERN_BANDS for letter in letters - {"S"}}
    if "S" in letters and len(letters) > 1:  # the northern band, unless the others are hemispheres
        souths |= {False, "N" in letters}
    is_mixed = any(len(its) > 1 and any(cell.other for cell in its) for its in cells.values())
    where = " and ".join(file.url for file in files)
    listed = "; ".join(f"{name} states {', '.join(sorted(its)[:4])}" for name, its in texts.items() if its)
    if is_mixed or len(numbers) > 1 or len(souths) > 1:
        raise UserError(f"{where}: the column {listed}; expected metres of one UTM zone, or latitude and longitude")
    if zone is not None and not (numbers <= {zone.number} and souths <= {zone.south}):
        raise UserError(
            f"{where}: the column {listed}; expected metres of UTM zone {zone.number} "
            f"{'south' if zone.south else 'north'}, in which those of the index are, or latitude and longitude"
        )


def _read_table(
    file: TableFile, columns: PositionColumns, pair: tuple[str, str], source: PositionsTable, problems: Problems
) -> _Located:
    """The usable rows, ordered by path; the others are problems."""
    has_heading = file.has(columns.heading)
    rows = file.read([columns.path, *pair, *([columns.heading] if has_heading else [])], problems)
    image_ids, is_usable = _listed(rows, columns.path, source, problems)
    coordinates = np.empty((len(rows), 2))
    for axis, name in enumerate(pair):
        is_degrees = pair == _pairs(columns)[1]
        coordinates[:, axis] = rows.floats(name, below_1000=is_degrees)
        is_number = ~np.isnan(coordinates[:, axis])
        for i in np.flatnonzero(~is_number).tolist():
            problems.add(f"{rows.where(i)}: {rows.cell(name, i)}; expected a number")
        is_inside = np.abs(coordinates[:, axis]) <= (_LIMITS_DEG[axis] if is_degrees else _MOST_UTM_M)
        expected = _range_text(axis) if is_degrees else "metres of one UTM zone"
        for i in np.flatnonzero(is_number & ~is_inside).tolist():
            problems.add(f"{rows.where(i)}: {rows.cell(name, i)}; expected {expected}")
        is_usable &= is_number & is_inside
    heading_deg = np.full(len(rows), np.nan)
    if has_heading:
        heading_deg = rows.floats(columns.heading, below_1000=True)
        for i in np.flatnonzero(np.isnan(heading_deg) & ~rows.empties(columns.heading)).tolist():
            problems.add(f"{rows.where(i)}: {rows.cell(columns.heading, i)}; expected degrees or nothing")
    usable = np.flatnonzero(is_usable)
    usable = usable[np.argsort(image_ids[usable])]
    return _Located(
        photos=source.photos.only(image_ids[usable]),
        coordinates=coordinates[usable],
        heading_deg=heading_deg[usable] % 360.0,
        where=lambda i: rows.where(usable[i]),
    )


def _listed(
    rows: Rows, name: str, source: PositionsTable, problems: Problems
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """(n,) ids of the photos that the rows name, and whether each exists and is named for the first time."""
    if not len(rows):
        problems.add(f"{rows.url}: no row that can be used; expected one for each photo")
    paths, photos = rows.texts(name), source.photos
    image_ids = find_photos(paths, photos, have_keys=source.have_keys)
    is_known = image_ids >= 0
    for i in np.flatnonzero(~is_known).tolist():
        why = no_photo_text(paths[i].as_py() or "", image_ids[i], photos.root)
        problems.add(
            f"{rows.where(i)}: {why}" + ("; expected a path below that folder" if image_ids[i] == NO_PHOTO else "")
        )
    _, firsts, groups = np.unique(image_ids, return_index=True, return_inverse=True)
    first = firsts[groups]
    is_again = is_known & (first != np.arange(len(rows)))
    for i in np.flatnonzero(is_again).tolist():
        problems.add(f"{rows.where(i)}: {photos.path(image_ids[i])} again, first in row {rows.numbers[first[i]]}")
    return image_ids, is_known & ~is_again


def _range_text(axis: int) -> str:
    return f"degrees from {-_LIMITS_DEG[axis]:g} to {_LIMITS_DEG[axis]:g}"


def _read_exif(photos: Manifest, problems: Problems) -> _Located:
    """The photos with a position; the others are problems."""
    kept, found = list[int](), list[GpsPosition]()
    for image_id, answer in _gps_positions(photos):
        if isinstance(answer, GpsPosition):
            kept.append(image_id)
            found.append(answer)
        else:
            problems.add(f"{photos.url(image_id)}: {answer}")
    numbers = [(one.latitude_deg, one.longitude_deg, one.heading_deg) for one in found]
    columns = np.array(numbers, dtype=np.float64).reshape(-1, 3)
    return _Located(
        photos=photos.only(np.array(kept, np.int64)),
        coordinates=columns[:, :2],
        heading_deg=columns[:, 2],
        where=lambda i: photos.url(kept[i]),
    )


def _gps_positions(photos: Manifest) -> Iterator[tuple[int, GpsPosition | str]]:
    """Each photo's id and its position, or the reason for none. Reads several at once, because storage is slow."""
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        for first in range(0, len(photos), _PHOTOS_AT_A_TIME):
            ids = range(first, min(first + _PHOTOS_AT_A_TIME, len(photos)))
            urls = [photos.url(image_id) for image_id in ids]
            for image_id, url, head in zip(ids, urls, readers.map(_head, urls), strict=True):
                try:
                    yield image_id, _gps_position(url, head)
                except GpsError as error:
                    yield image_id, str(error)


def _head(url: str) -> bytes | OSError:
    try:
        return storage.read_head(url, NUM_HEAD_BYTES)
    except OSError as error:
        return error


def _gps_position(url: str, head: bytes | OSError) -> GpsPosition:
    """The position from a photo's first bytes if they are enough, otherwise from all. Raises `GpsError`."""
    try:
        if isinstance(head, OSError):
            raise head
        try:
            position = gps_position(head)
        except GpsError:
            if len(head) < NUM_HEAD_BYTES:
                raise
            position = gps_position(storage.read_bytes(url))
    except OSError as error:
        raise GpsError(f"can't be read: {storage.reason(error)}") from error
    for axis, (tag, value) in enumerate(
        [("GPSLatitude", position.latitude_deg), ("GPSLongitude", position.longitude_deg)]
    ):
        if abs(value) > _LIMITS_DEG[axis]:
            raise GpsError(f"{tag} is {value:g}; expected {_range_text(axis)}")
    return position
