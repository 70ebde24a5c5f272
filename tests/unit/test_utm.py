"""UTM against another implementation, the ellipsoid itself and hand-computed neighbours across zones."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from pairvpr.data.utm import MOST_EAST_M, UtmZone, is_near, to_utm, zone_of

EQUATORIAL_RADIUS_M, FLATTENING, SCALE = 6_378_137.0, 1 / 298.257223563, 0.9996
E2 = FLATTENING * (2 - FLATTENING)


def one(latitude_deg: float, longitude_deg: float, zone: UtmZone) -> tuple[float, float]:
    east, north = to_utm(np.array([latitude_deg]), np.array([longitude_deg]), zone)[0]
    return float(east), float(north)


def radii_m(latitude_deg: float) -> tuple[float, float]:
    """Radii of curvature of the WGS84 ellipsoid along the meridian and across it."""
    w2 = 1 - E2 * math.sin(math.radians(latitude_deg)) ** 2
    return EQUATORIAL_RADIUS_M * (1 - E2) / w2**1.5, EQUATORIAL_RADIUS_M / math.sqrt(w2)


# PROJ 9.5.1, EPSG:326xx and 327xx, rounded to 0.1 mm; the first is also the example of GeographicLib's GeoConvert.
PROJ = [
    (33.3, 44.4, 38, False, 444140.5449, 3684706.3555),
    (48.8582, 2.2945, 31, False, 448251.7952, 5411932.6777),
    (50.7753, 5.9999, 31, False, 711497.5919, 5629128.8655),
    (50.7753, 6.0001, 31, False, 711511.6897, 5629129.4378),
    (50.7753, 6.0001, 32, False, 288502.4081, 5629128.8655),
    (-37.8136, 144.9631, 55, True, 320704.4463, 5812911.6995),
    (-0.0001, -78.4678, 17, False, 781862.8517, -11.0639),
    (-0.0001, -78.4678, 17, True, 781862.8517, 9999988.9361),
    (60.39, 5.32, 32, False, 297230.2202, 6700510.1753),
    (-33.9249, 18.4241, 34, True, 261881.5985, 6243182.3545),
    (37.7749, -122.4194, 10, False, 551130.7685, 4180998.8815),
    (-16.8, -179.99, 60, True, 820855.8023, 8140132.1794),
    (83.9, 10.0, 31, False, 582845.1948, 9321968.6349),
    (45.0, 20.0, 31, False, 1839624.7982, 5125583.6338),
]


@pytest.mark.parametrize(("latitude_deg", "longitude_deg", "number", "south", "east_m", "north_m"), PROJ)
def test_equals_proj(
    latitude_deg: float, longitude_deg: float, number: int, south: bool, east_m: float, north_m: float
) -> None:
    assert one(latitude_deg, longitude_deg, UtmZone(number, south)) == pytest.approx((east_m, north_m), rel=0, abs=6e-5)


@pytest.mark.parametrize("latitude_deg", [-80.0, -33.3, 0.0, 1e-6, 12.5, 45.0, 66.6, 84.0, 90.0])
def test_the_central_meridian_is_the_arc_of_the_ellipse(latitude_deg: float) -> None:
    arc_m, _ = quad(lambda angle: radii_m(math.degrees(angle))[0], 0, math.radians(latitude_deg), epsabs=1e-9)
    east_m, north_m = one(latitude_deg, 9.0, UtmZone(32, south=False))
    assert east_m == pytest.approx(500_000, abs=1e-9)
    assert north_m == pytest.approx(SCALE * arc_m, rel=0, abs=1e-6)


@given(st.floats(-75, 75), st.floats(-3, 3), st.integers(1, 60), st.booleans(), st.floats(-50, 50), st.floats(-50, 50))
def test_small_distances_are_those_on_the_ellipsoid_times_the_scale(
    latitude_deg: float, from_meridian_deg: float, number: int, south: bool, to_east_m: float, to_north_m: float
) -> None:
    """Conformal: a step of some metres keeps its length but for the projection's scale, whichever way it goes."""
    zone = UtmZone(number, south)
    along_m, across_m = radii_m(latitude_deg)
    longitude_deg = zone.central_meridian_deg + from_meridian_deg
    circle_m = across_m * math.cos(math.radians(latitude_deg))
    near = [latitude_deg + math.degrees(to_north_m / along_m), longitude_deg + math.degrees(to_east_m / circle_m)]
    step_m = np.subtract(one(near[0], near[1], zone), one(latitude_deg, longitude_deg, zone))
    from_meridian_m = circle_m * math.radians(from_meridian_deg)
    scale = SCALE * (
        1 + from_meridian_m**2 / (2 * along_m * across_m) + from_meridian_m**4 / (24 * along_m**2 * across_m**2)
    )
    # A step along a parallel is not a straight line; 50 m at 75 degrees bend by less than 1 mm.
    assert np.hypot(*step_m) == pytest.approx(scale * math.hypot(to_east_m, to_north_m), rel=2e-5, abs=2e-3)


def test_positions_across_the_border_of_two_zones_are_neighbours() -> None:
    """0.0002 degrees of longitude at 50.7753 north are 14.11 m; in zones of their own they would be 423 km apart."""
    latitude_deg, longitude_deg = np.array([50.7753, 50.7753]), np.array([5.9999, 6.0001])
    circle_m = radii_m(50.7753)[1] * math.cos(math.radians(50.7753))
    assert circle_m * math.radians(0.0002) == pytest.approx(14.107, abs=1e-3)
    for number in (31, 32):
        west, east = to_utm(latitude_deg, longitude_deg, UtmZone(number, south=False))
        assert np.hypot(*(east - west)) == pytest.approx(14.107, rel=5e-4)


@pytest.mark.parametrize(
    ("latitude_deg", "longitude_deg", "number", "south"),
    [
        ([50.0], [5.999], 31, False),
        ([50.0], [6.0], 32, False),
        ([50.0, 50.0, 50.0], [5.9, 5.99, 6.3], 31, False),
        ([-0.1, 0.2, 0.3], [-78.5, -78.5, -78.5], 17, False),
        ([-0.1, -0.2, 0.3], [-78.5, -78.5, -78.5], 17, True),
        ([-16.8, -16.8, -16.8], [179.9, -179.99, -179.9], 1, True),
        ([-16.8, -16.8, -16.8], [-179.99, 179.9, 179.8], 60, True),
        ([0.0], [-180.0], 1, False),
        ([0.0], [180.0], 1, False),
        ([60.39], [5.32], 31, False),
        ([48.0, 48.0], [139.0, 9.0], 32, False),
    ],
)
def test_the_zone_is_that_of_the_median(
    latitude_deg: list[float], longitude_deg: list[float], number: int, south: bool
) -> None:
    assert zone_of(np.array(latitude_deg), np.array(longitude_deg)) == UtmZone(number, south)


@pytest.mark.parametrize("south", [False, True])
def test_nothing_jumps_at_the_equator_or_at_the_180th_meridian(south: bool) -> None:
    degrees_of_10_m = 9.0e-5
    equator = to_utm(np.array([-degrees_of_10_m, degrees_of_10_m]), np.array([32.0, 32.0]), UtmZone(36, south))
    assert np.hypot(*(equator[1] - equator[0])) == pytest.approx(19.9, abs=0.05)
    edge = to_utm(np.zeros(2), np.array([180 - degrees_of_10_m, -180 + degrees_of_10_m]), UtmZone(1, south))
    assert (edge[1] - edge[0]).tolist() == pytest.approx([20.05, 0.0], abs=0.05)


def test_what_is_too_far_from_the_zone_is_told() -> None:
    longitude_deg = np.array([3.0, 11.0, 11.2, 90.0, 93.0, -177.0, 183.0, np.nan])
    positions = to_utm(np.zeros(8), longitude_deg, UtmZone(31, south=False))
    assert is_near(positions).tolist() == [True, True, False, False, False, True, True, False]
    assert abs(positions[1, 0] - 500_000) < MOST_EAST_M < abs(positions[2, 0] - 500_000)
