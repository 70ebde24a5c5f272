"""Boxes in degrees, against every point inside them and on their edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pairvpr.data import utm
from pairvpr.data.manifest import Manifest
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError
from pairvpr.where import Map, TooFarError, Utm, Where


def map_of(zone: UtmZone) -> Map:
    """An index with one photo, somewhere in the zone."""
    return Map(Manifest.of("photos", ["a.jpg"], np.array([[500_000.0, 5_000_000.0]])), zone.epsg)


def box_of(place: Map, south: float, west: float, north: float, east: float) -> np.ndarray:
    found = place.filters(Where(box=((south, west), (north, east))), 1)
    assert found is not None
    return found[0].conditions[0, 3:7]


@settings(max_examples=300)
@given(
    number=st.sampled_from([1, 10, 31, 60]),  # the first and the last meet at the date line
    is_south=st.booleans(),
    south=st.integers(-790, 830).map(lambda tenths: tenths / 10) | st.integers(-30, 0).map(lambda tenths: tenths / 10),
    height=st.integers(0, 30).map(lambda tenths: tenths / 10),
    from_middle=st.integers(-50, 40).map(lambda tenths: tenths / 10),
    width=st.integers(0, 30).map(lambda tenths: tenths / 10),
)
@example(number=10, is_south=False, south=37.0, height=1.0, from_middle=-1.0, width=2.0)  # the central meridian
@example(number=10, is_south=True, south=-38.0, height=1.0, from_middle=-1.0, width=2.0)
@example(number=31, is_south=False, south=-1.0, height=3.0, from_middle=1.0, width=1.0)  # the equator
@example(number=31, is_south=True, south=-1.0, height=3.0, from_middle=-3.0, width=1.0)
@example(number=60, is_south=False, south=65.0, height=1.0, from_middle=2.0, width=2.0)  # the date line
@example(number=1, is_south=False, south=65.0, height=1.0, from_middle=-4.0, width=5.0)  # and the central meridian
def test_the_smallest_box_along_the_grid_that_holds_it(
    number: int, is_south: bool, south: float, height: float, from_middle: float, width: float
) -> None:
    """Also across the central meridian, the equator and the date line."""
    zone = UtmZone(number, south=is_south)
    north, west = min(south + height, 84.0), zone.central_meridian_deg + from_middle
    latitudes, longitudes = np.meshgrid(
        np.union1d(np.linspace(south, north, 41), np.clip(0.0, south, north)),
        np.union1d(np.linspace(west, west + width, 41), np.clip(zone.central_meridian_deg, west, west + width)),
    )
    inside = utm.to_utm(latitudes.ravel(), longitudes.ravel(), zone)
    found = box_of(map_of(zone), south, wrapped(west), north, wrapped(west + width))
    expected = np.concatenate([inside.min(axis=0), inside.max(axis=0)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def wrapped(longitude_deg: float) -> float:
    return (longitude_deg + 180.0) % 360.0 - 180.0


def test_a_tall_box_far_from_the_central_meridian_is_one() -> None:
    """Its north-east corner has less east than its south-west corner."""
    west, south, east, north = box_of(map_of(UtmZone(10, south=False)), 37.0, -120.001, 38.0, -120.0)
    assert 3000 < east - west < 6000
    assert 110_000 < north - south < 112_000


@pytest.mark.parametrize("box", [((38, -122), (37, -121)), ((37, -121), (38, -122)), (Utm(2, 1), Utm(1, 2))])
def test_corners_in_another_order(box: tuple[tuple[float, float], tuple[float, float]]) -> None:
    with pytest.raises(UserError, match="expected the south-west corner first, then the north-east one"):
        map_of(UtmZone(10, south=False)).filters(Where(box=box), 1)


def test_a_box_of_another_continent() -> None:
    with pytest.raises(TooFarError, match="too far from UTM zone 10"):
        box_of(map_of(UtmZone(10, south=False)), 48.0, 11.0, 48.2, 11.2)
