"""Focal points, viewing angles and crops of SF-XL equal those of the published method, number by number."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pairvpr.data import panoramas
from tests.support.shared import SHARED, needs_shared

pytestmark = needs_shared


@pytest.fixture(scope="module")
def cases() -> list[dict[str, Any]]:
    return json.loads((SHARED / "parity" / "sfxl_geometry.json").read_text())["cases"]


def test_focal_points(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        utm_m, published = np.array(case["utms"]), np.array(case["axis_used"])
        axis = panoramas.second_axis(utm_m)
        sign = np.sign(axis @ published)
        np.testing.assert_allclose(sign * axis, published, rtol=0, atol=1e-9)
        assert abs(axis @ np.array(case["first_axis"])) < 1e-9
        # The published axis may point the other way: half a turn more.
        rotation_deg = case["rotation_degrees"] + (0.0 if sign > 0 else 180.0)
        focal_m = panoramas.focal_point(utm_m, rotation_deg, case["focal_distance"])
        np.testing.assert_allclose(focal_m, case["focal_point"], rtol=0, atol=1e-6)


def test_viewing_angles_and_their_differences(cases: list[dict[str, Any]]) -> None:
    for case in cases:
        utm_m = np.array([view["utm"] for view in case["views"]])
        published_deg = np.array([view["angle"] for view in case["views"]])
        angles_deg = panoramas.viewing_angles_deg(utm_m, np.array(case["focal_point"]))
        np.testing.assert_allclose(angles_deg, published_deg, rtol=0, atol=1e-6)
        differences_deg = panoramas.differences_deg(angles_deg[0], angles_deg)
        np.testing.assert_allclose(differences_deg, np.abs(case["angle_difference"]), rtol=0, atol=1e-6)


def test_left_edges_are_equal(cases: list[dict[str, Any]]) -> None:
    num_views = 0
    for case in cases:
        utm_m = np.array([view["utm"] for view in case["views"]])
        angles_deg = panoramas.viewing_angles_deg(utm_m, np.array(case["focal_point"]))
        lefts_px = panoramas.left_edges_px([view["yaw"] for view in case["views"]], angles_deg)
        assert lefts_px.tolist() == [view["offset"] for view in case["views"]]
        num_views += len(lefts_px)
    assert num_views >= 60
