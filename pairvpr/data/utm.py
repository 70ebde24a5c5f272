"""WGS84 latitude and longitude -> UTM metres, all photos of a benchmark in one zone.

The transverse Mercator projection by Krueger's series to the sixth order in the third flattening n, as given by
Karney, "Transverse Mercator with an accuracy of a few nanometers", J. Geodesy 85 (2011), equations 7 to 11 and 35
(Krueger, "Konforme Abbildung des Erdellipsoids in der Ebene", 1912). Within 3,900 km of the zone's central meridian
the series is exact to nanometres, so positions beyond the zone's edges are as good as those inside; what grows with
the distance is the scale of the projection, see `MOST_EAST_M`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_EPSG_NORTH, _EPSG_SOUTH, _NUM_ZONES = 32600, 32700, 60

MOST_EAST_M = 900_000.0
"""Beyond this distance from the central meridian, distances on the map are more than 1 % too long."""

_EQUATORIAL_RADIUS_M = 6_378_137.0
_FLATTENING = 1 / 298.257223563
_SCALE = 0.9996
_FALSE_EAST_M, _FALSE_NORTH_M = 500_000.0, 10_000_000.0
_ECCENTRICITY = math.sqrt(_FLATTENING * (2 - _FLATTENING))
_N = _FLATTENING / (2 - _FLATTENING)
_RECTIFYING_RADIUS_M = _EQUATORIAL_RADIUS_M / (1 + _N) * (1 + _N**2 / 4 + _N**4 / 64 + _N**6 / 256)
_ALPHA = tuple(
    _N**order * float(np.polynomial.Polynomial(coefficients)(_N))
    for order, coefficients in (
        (1, (1 / 2, -2 / 3, 5 / 16, 41 / 180, -127 / 288, 7891 / 37800)),
        (2, (13 / 48, -3 / 5, 557 / 1440, 281 / 630, -1983433 / 1935360)),
        (3, (61 / 240, -103 / 140, 15061 / 26880, 167603 / 181440)),
        (4, (49561 / 161280, -179 / 168, 6601661 / 7257600)),
        (5, (34729 / 80640, -3418889 / 1995840)),
        (6, (212378941 / 319334400,)),
    )
)
_BETA = tuple(
    _N**order * float(np.polynomial.Polynomial(coefficients)(_N))
    for order, coefficients in (
        (1, (1 / 2, -2 / 3, 37 / 96, -1 / 360, -81 / 512, 96199 / 604800)),
        (2, (1 / 48, 1 / 15, -437 / 1440, 46 / 105, -1118711 / 3870720)),
        (3, (17 / 480, -37 / 840, -209 / 4480, 5569 / 90720)),
        (4, (4397 / 161280, -11 / 504, -830251 / 7257600)),
        (5, (4583 / 161280, -108847 / 3991680)),
        (6, (20648693 / 638668800,)),
    )
)
_NEWTON_STEPS = 5
"""Newton steps from the conformal latitude to the geographic one; two reach double precision."""


@dataclass(frozen=True)
class UtmZone:
    """A zone by number (1 to 60) and hemisphere; all photos of a benchmark are projected into it, wherever they are."""

    number: int
    south: bool
    """Whether the false northing of 10,000 km is added, as is usual south of the equator."""

    @property
    def central_meridian_deg(self) -> float:
        """Longitude at which east is 500 km."""
        return 6.0 * self.number - 183.0

    @property
    def epsg(self) -> int:
        """Its EPSG code: 32601 to 32660 in the north, 32701 to 32760 in the south."""
        return (_EPSG_SOUTH if self.south else _EPSG_NORTH) + self.number

    @classmethod
    def of_epsg(cls, code: int) -> UtmZone:
        """The zone with this EPSG code. Raises `ValueError` for the code of anything else."""
        for first, south in ((_EPSG_NORTH, False), (_EPSG_SOUTH, True)):
            if isinstance(code, int) and first < code <= first + _NUM_ZONES:
                return cls(code - first, south)
        raise ValueError(
            f"expected a WGS84 UTM zone: {_EPSG_NORTH} + its number in the north, {_EPSG_SOUTH} + its number in the "
            "south"
        )


def zone_of(latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64]) -> UtmZone:
    """The zone of the median longitude and latitude (n,), n > 0: plain 6 degree zones, Norway and Svalbard too.

    The median is always a photo's value, the lower of two middle ones. Longitudes are taken relative to the first one,
    so photos on both sides of the 180th meridian are neighbours.
    """
    first = float(longitude_deg[0])
    middle = first + _median(_wrapped(longitude_deg - first))
    number = math.floor((middle + 180.0) / 6.0) % 60 + 1
    return UtmZone(number, south=_median(latitude_deg) < 0.0)


def to_utm(latitude_deg: NDArray[np.float64], longitude_deg: NDArray[np.float64], zone: UtmZone) -> NDArray[np.float64]:
    """(n, 2) east and north in metres of `zone` for (n,) degrees of WGS84.

    Points outside the range of `zone` are not finite, or beyond `MOST_EAST_M` from 500 km east.
    """
    latitude, longitude = np.radians(latitude_deg), np.radians(_wrapped(longitude_deg - zone.central_meridian_deg))
    with np.errstate(all="ignore"):
        tangent = np.tan(latitude)
        sigma = np.sinh(_ECCENTRICITY * np.arctanh(_ECCENTRICITY * np.sin(latitude)))
        conformal = tangent * np.hypot(1.0, sigma) - sigma * np.hypot(1.0, tangent)
        xi = np.arctan2(conformal, np.cos(longitude))
        eta = np.arcsinh(np.sin(longitude) / np.hypot(conformal, np.cos(longitude)))
        terms = [(2 * order, alpha) for order, alpha in enumerate(_ALPHA, start=1)]
        north = xi + sum(alpha * np.sin(k * xi) * np.cosh(k * eta) for k, alpha in terms)
        east = eta + sum(alpha * np.cos(k * xi) * np.sinh(k * eta) for k, alpha in terms)
        scale_m = _SCALE * _RECTIFYING_RADIUS_M
        return np.stack([_FALSE_EAST_M + scale_m * east, _FALSE_NORTH_M * zone.south + scale_m * north], axis=1)


def to_degrees(utm_m: NDArray[np.float64], zone: UtmZone) -> NDArray[np.float64]:
    """(n, 2) latitude and longitude in degrees of WGS84 for metres (n, 2) in `zone`: the inverse of `to_utm`.

    NaN where a position is unknown.
    """
    scale_m = _SCALE * _RECTIFYING_RADIUS_M
    xi = (utm_m[:, 1] - _FALSE_NORTH_M * zone.south) / scale_m
    eta = (utm_m[:, 0] - _FALSE_EAST_M) / scale_m
    terms = [(2 * order, beta) for order, beta in enumerate(_BETA, start=1)]
    north = xi - sum(beta * np.sin(k * xi) * np.cosh(k * eta) for k, beta in terms)
    east = eta - sum(beta * np.cos(k * xi) * np.sinh(k * eta) for k, beta in terms)
    conformal = np.sin(north) / np.hypot(np.sinh(east), np.cos(north))
    tangent = conformal.copy()
    for _ in range(_NEWTON_STEPS):  # Karney, equations 19 to 21
        sigma = np.sinh(_ECCENTRICITY * np.arctanh(_ECCENTRICITY * tangent / np.hypot(1.0, tangent)))
        found = tangent * np.hypot(1.0, sigma) - sigma * np.hypot(1.0, tangent)
        flat = 1 - _ECCENTRICITY**2
        slope = (1 + flat * tangent**2) / (flat * np.hypot(1.0, found) * np.hypot(1.0, tangent))
        tangent += (conformal - found) * slope
    longitude_deg = zone.central_meridian_deg + np.degrees(np.arctan2(np.sinh(east), np.cos(north)))
    return np.stack([np.degrees(np.arctan(tangent)), _wrapped(longitude_deg)], axis=1)


def is_near(utm_m: NDArray[np.float64]) -> NDArray[np.bool_]:
    """(n,) whether positions (n, 2) are close enough to their zone for distances to be accurate to 1 %."""
    return np.isfinite(utm_m).all(axis=1) & (np.abs(utm_m[:, 0] - _FALSE_EAST_M) <= MOST_EAST_M)


def _median(values: NDArray[np.float64]) -> float:
    return float(np.percentile(values, 50, method="lower"))


def _wrapped(degrees: NDArray[np.float64]) -> NDArray[np.float64]:
    """Angles wrapped to -180 to below 180."""
    return (degrees + 180.0) % 360.0 - 180.0
