"""Positions of an index's photos, and conditions on them. Q query photos, n photos in the index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import NamedTuple, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from pairvpr.data import utm
from pairvpr.data.manifest import Manifest
from pairvpr.data.positions import zone_of_metres
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError
from pairvpr.index.filters import Filters, Places

_MOST_LATITUDE_DEG, _MOST_LONGITUDE_DEG = 90.0, 180.0


class Utm(NamedTuple):
    """A position in metres in the index's UTM zone. A plain pair of numbers is latitude and longitude instead."""

    east_m: float
    north_m: float


Position: TypeAlias = "tuple[float, float] | Utm"
"""(latitude, longitude) in degrees of WGS84, or `Utm`."""


class TooFarError(UserError):
    """A position so far from the index that it has no place in the index's UTM zone."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Conditions on the photos that may be found; all must hold; None = no condition.

    `near` and `heading_deg` are for all query photos, or a sequence with one for each.
    """

    near: Position | Sequence[Position] | None = None
    radius_m: float | None = None
    box: tuple[Position, Position] | None = None
    heading_deg: float | Sequence[float] | None = None
    within_deg: float | None = None

    def __post_init__(self) -> None:
        for one, value, other, its in (
            ("near", self.near, "radius_m", self.radius_m),
            ("heading_deg", self.heading_deg, "within_deg", self.within_deg),
        ):
            if (value is None) != (its is None):
                raise UserError(f"{one}={value}, {other}={its}: expected both of them, or neither")
        for name in ("radius_m", "within_deg"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise UserError(f"{name}={value}: expected a number above 0, and finite")

    @property
    def is_anywhere(self) -> bool:
        """Whether there is no condition."""
        return self.near is None and self.box is None and self.heading_deg is None


ANYWHERE = Where()


class Map:
    """Positions of an index's photos. `epsg` is the code of their UTM zone, if known."""

    def __init__(self, images: Manifest, epsg: int | None) -> None:
        self.places = Places(images.utm_m, images.heading_deg)
        self._images = images
        self._epsg = epsg
        if epsg is not None:
            self._zone_given(epsg)

    @cached_property
    def zone(self) -> UtmZone | None:
        """The UTM zone of the index's metres: as it was given, or as its photos say it."""
        return zone_of_metres(self._images) if self._epsg is None else self._zone_given(self._epsg)

    def _zone_given(self, epsg: int) -> UtmZone:
        """Raises `UserError` for the code of no zone, and of another zone than the index records."""
        try:
            zone = UtmZone.of_epsg(epsg)
        except ValueError as error:
            raise UserError(f"utm_epsg={epsg}: {error}") from error
        recorded = self._images.zone
        if recorded not in (None, zone):
            raise UserError(f"utm_epsg={epsg}: the index's positions are in EPSG:{recorded.epsg}; expected it or none")
        return zone

    def degrees(self, image_ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, 2) latitude and longitude of photos; NaN where unknown."""
        return self.degrees_of(self.places.utm_m[image_ids])

    def degrees_of(self, utm_m: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, 2) latitude and longitude of positions (n, 2) in metres; NaN where the zone is unknown."""
        if self.zone is None:
            return np.full(utm_m.shape, np.nan)
        return utm.to_degrees(utm_m, self.zone)

    def filters(self, where: Where, num_asked: int) -> tuple[Filters, Places] | None:
        """Conditions for each query photo; None without any.

        Raises `UserError` if no photo of the index can meet a condition, and for invalid positions or headings.
        """
        if where.is_anywhere:
            return None
        for is_needed, known, what in (
            (where.near is not None or where.box is not None, self.places.utm_m[:, 0], "position"),
            (where.heading_deg is not None, self.places.heading_deg, "heading"),
        ):
            if is_needed and np.isnan(known).all():
                raise UserError(
                    f"the index has no {what} of its photos, which near, box or heading_deg need; expected one built "
                    "with "
                    "positions=names, table or exif"
                )
        filters = Filters.of(
            num_asked,
            near=None if where.near is None else self._near(where.near, num_asked),
            radius_m=where.radius_m,
            box=None if where.box is None else self._box(where.box),
            heading_deg=None if where.heading_deg is None else _headings(where.heading_deg, num_asked),
            within_deg=where.within_deg,
        )
        return filters, self.places

    def _near(self, near: Position | Sequence[Position], num_asked: int) -> NDArray[np.float64]:
        """(2,) for all, or (Q, 2)."""
        if _is_pair(near) or isinstance(near, str) or not isinstance(near, Sequence):
            return self._metres(cast(Position, near), "near")
        each = list(cast("Sequence[Position]", near))
        if len(each) != num_asked:
            raise UserError(f"near: {len(each)} positions for {num_asked} photos; expected one, or one for each")
        return np.array([self._metres(position, f"near[{number}]") for number, position in enumerate(each)])

    def _box(self, box: tuple[Position, Position]) -> NDArray[np.float64]:
        """(4,) west, south, east, north in metres: as given, or the smallest such box around one in degrees."""
        if not isinstance(box, Sequence) or len(box) != 2 or not all(_is_pair(corner) for corner in box):
            raise UserError(f"box={box}: expected two positions, the south-west and the north-east corner")
        corners = np.array([self._metres(corner, "box") for corner in box])
        if isinstance(box[0], Utm) != isinstance(box[1], Utm):
            raise UserError(f"box={box}: expected both corners in degrees, or both as pairvpr.Utm")
        if isinstance(box[0], Utm):
            is_ordered, extremes = (corners[0] <= corners[1]).all(), corners
        else:
            (south, west), (north, east) = box
            width_deg = (east - west) % 360.0  # also across the date line
            is_ordered = south <= north and width_deg <= _MOST_LONGITUDE_DEG
            extremes = self._extremes(south, west, north, west + width_deg)
        if not is_ordered:
            raise UserError(f"box={box}: expected the south-west corner first, then the north-east one")
        return np.concatenate([extremes.min(axis=0), extremes.max(axis=0)])

    def _extremes(self, south: float, west: float, north: float, east: float) -> NDArray[np.float64]:
        """(9, 2) metres of a box's corners and middles, in degrees, among which are its extreme positions.

        In the projection a parallel is lowest, or highest, at the central meridian, and a meridian is farthest from it
        at the equator.
        """
        assert self.zone is not None, "positions in degrees were converted before"
        middle = self.zone.central_meridian_deg
        middle += 360.0 * round(((west + east) / 2 - middle) / 360.0)
        latitudes, longitudes = np.meshgrid(
            [south, np.clip(0.0, south, north), north], [west, np.clip(middle, west, east), east]
        )
        return utm.to_utm(latitudes.ravel(), longitudes.ravel(), self.zone)

    def _metres(self, position: Position, key: str) -> NDArray[np.float64]:
        """(2,) east and north in the zone of the index."""
        if not _is_pair(position):
            raise UserError(f"{key}={position}: expected (latitude, longitude) in degrees, or pairvpr.Utm in metres")
        values = np.array(position, np.float64)
        if not np.isfinite(values).all():
            raise UserError(f"{key}={position}: expected finite numbers")
        if isinstance(position, Utm):
            return values
        if (np.abs(values) > (_MOST_LATITUDE_DEG, _MOST_LONGITUDE_DEG)).any():
            raise UserError(
                f"{key}={position}: expected latitude and longitude in degrees (at most 90 and 180), or "
                "pairvpr.Utm(east_m, north_m) for metres"
            )
        if self.zone is None:
            raise UserError(
                f"{key}={position}: the index has positions in metres, but no UTM zone; expected utm_epsg=..., the "
                "zone's EPSG code (32610 is zone 10 north), when it is opened, or pairvpr.Utm(east_m, north_m)"
            )
        metres = utm.to_utm(values[:1], values[1:], self.zone)
        if not utm.is_near(metres)[0]:
            raise TooFarError(f"{key}={position}: too far from UTM zone {self.zone.number}, which the index is in")
        return metres[0]


def _headings(heading_deg: float | Sequence[float], num_asked: int) -> NDArray[np.float64]:
    """() for all, or (Q,)."""
    try:
        values = np.asarray(heading_deg, np.float64)
    except (TypeError, ValueError):
        values = np.array(np.nan)
    if values.shape not in ((), (num_asked,)) or not np.isfinite(values).all():
        raise UserError(f"heading_deg={heading_deg}: expected a number of degrees, or one for each of {num_asked}")
    return values


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_is_number(number) for number in value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
