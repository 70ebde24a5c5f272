"""Names, cells, focal points, viewing angles and crops of SF-XL's panoramas, each against a second way to get it."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pairvpr.data import panoramas
from pairvpr.data.images import BrokenImageError
from pairvpr.errors import UserError

NAME = "37.70/@0543256.96@4178906.70@10@S@037.75766@-122.50905@tMA7AwkzaxNPIYNe@@235@@@@201311@@.jpg"
METRES = st.floats(-30.0, 30.0, allow_nan=False)


def test_a_published_name_states_position_and_yaw() -> None:
    utm_m, yaw_deg = panoramas.parse_names(pa.array([NAME]), "here")
    assert utm_m.tolist() == [[543256.96, 4178906.70]]
    assert yaw_deg.tolist() == [235.0]


@given(
    st.lists(st.tuples(st.decimals(0, 999999, places=2), st.decimals(0, 9999999, places=2), st.integers(0, 359))),
    st.sampled_from(["", "panoramas/37.70/", "a@b/"]),
)
def test_names_are_split_at_the_at_sign(rows: list[tuple[object, object, int]], folder: str) -> None:
    paths = [
        f"{folder}@{east}@{north}@10@S@@@id_-{i}@@{yaw}@@@@201311@@.jpg" for i, (east, north, yaw) in enumerate(rows)
    ]
    utm_m, yaw_deg = panoramas.parse_names(pa.array(paths, pa.large_string()), "here")
    fields = [path.rpartition("/")[2].split("@") for path in paths]
    assert utm_m.tolist() == [[float(field[1]), float(field[2])] for field in fields]
    assert yaw_deg.tolist() == [float(field[9]) for field in fields]


@pytest.mark.parametrize(
    "name", ["photo.jpg", "@1@2@.jpg", NAME.replace("@235@", "@@"), NAME.replace("@0543", "@x0543")]
)
def test_another_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(
        UserError, match=r"^here: \S+ is not the name of a panorama; expected @utm_east@.*field 9$"
    ) as error:
        panoramas.parse_names(pa.array([NAME, name, "worse.jpg"]), "here")
    assert name in str(error.value)


def test_cells_are_multiples_of_fifteen_metres() -> None:
    utm_m = np.array([[0.0, 14.99], [15.0, 29.99], [543256.96, 4178906.70], [-0.01, -15.0]])
    assert panoramas.cells_m(utm_m).tolist() == [[0, 0], [15, 15], [543255, 4178895], [-15, -15]]


@given(st.lists(st.tuples(METRES, METRES), min_size=2, max_size=8))
def test_positions_vary_least_along_the_second_axis(offsets_m: list[tuple[float, float]]) -> None:
    utm_m = np.array(offsets_m)
    axis = panoramas.second_axis(utm_m)
    assert np.linalg.norm(axis) == pytest.approx(1.0)
    centred = utm_m - utm_m.mean(axis=0)
    singular_values = np.linalg.svd(centred, compute_uv=False)
    assert np.linalg.norm(centred @ axis) == pytest.approx(singular_values[1], abs=1e-5)


def test_the_focal_point_of_a_street_lies_beside_it_and_turns_anticlockwise() -> None:
    street_m = np.array([[100.0 + along, 200.0] for along in (-6, -2, 1, 7)])
    np.testing.assert_allclose(panoramas.focal_point(street_m, 0.0, 12.0), [100.0, 212.0], atol=1e-9)
    np.testing.assert_allclose(panoramas.focal_point(street_m, 90.0, 12.0), [88.0, 200.0], atol=1e-9)


def test_focal_points_are_drawn_by_whole_angles_and_distances() -> None:
    street_m = np.array([[along, 0.0] for along in (-6.0, -1.0, 7.0)])
    rng = np.random.default_rng(0)
    focal_m = np.array([panoramas.draw_focal_point(street_m, rng) for _ in range(3000)])
    distances_m = np.hypot(*focal_m.T)
    angles_deg = np.rad2deg(np.arctan2(focal_m[:, 1], focal_m[:, 0])) % 360.0
    assert set(distances_m.round(9)) == set(range(10, 21))
    np.testing.assert_allclose(angles_deg, angles_deg.round(), atol=1e-9)
    assert len(set(angles_deg.round() % 360)) == 360


def test_viewing_angles_run_clockwise_from_north() -> None:
    focal_m = np.array([10.0, 20.0])
    utm_m = np.array([[10.0, 10.0], [0.0, 20.0], [10.0, 30.0], [20.0, 20.0], [0.0, 10.0]])
    np.testing.assert_allclose(panoramas.viewing_angles_deg(utm_m, focal_m), [0, 90, 180, 270, 45], atol=1e-12)


@given(st.floats(0, 360), st.floats(0, 360))
def test_differences_are_the_short_way_round(first_deg: float, second_deg: float) -> None:
    (difference,) = panoramas.differences_deg(first_deg, np.array([second_deg]))
    cosine = math.cos(math.radians(first_deg - second_deg))
    assert math.cos(math.radians(difference)) == pytest.approx(cosine, abs=1e-9)
    assert 0.0 <= difference <= 180.0


@given(st.integers(0, 359), st.floats(0, 360, exclude_max=True))
def test_left_edges_follow_the_written_formula(yaw_deg: int, angle_deg: float) -> None:
    by_hand = (int(((180 - yaw_deg) % 360) / 360 * 3328) + int(angle_deg / 360 * 3328) - 256) % 3328
    assert panoramas.left_edges_px([yaw_deg], [angle_deg]).tolist() == [by_hand]


def test_the_middle_of_a_panorama_looks_along_its_yaw() -> None:
    yaws_deg = np.arange(0.0, 360.0, 7.0)
    lefts_px = panoramas.left_edges_px(yaws_deg, yaws_deg)
    assert np.abs(lefts_px + 256 - 3328 // 2).max() <= 2


class Draws(np.random.Generator):
    """A generator whose `integers` are known beforehand."""

    def __init__(self, choices: list[int]) -> None:
        super().__init__(np.random.PCG64(0))
        self.choices = choices

    def integers(self, *_: object, **__: object) -> int:  # type: ignore[override]
        return self.choices.pop(0)


@pytest.mark.parametrize(
    ("choices", "chosen"),
    [
        ([2], 2),  # 20 degrees: at once
        ([3], 3),  # exactly 3
        ([4], 4),  # exactly 50
        ([0, 1, 5, 2], 2),  # too near, too near, too far
        ([1, 1, 1, 1, 1], 1),  # 2 degrees: enough for the fifth draw
        ([5, 5, 5, 5, 0, 5], 5),  # next to nothing is not
        ([0] * 10, 0),  # the tenth is taken as it comes
    ],
)
def test_the_second_view_is_drawn_again_by_rule(choices: list[int], chosen: int) -> None:
    others_deg = np.array([350.05, 352.0, 10.0, 353.0, 40.0, 170.0])
    draws = Draws(choices)
    assert panoramas.draw_second(350.0, others_deg, draws) == chosen
    assert draws.choices == []


@pytest.mark.parametrize("left_px", [0, 1, 2815, 2816, 2817, 3327])
def test_crops_go_on_at_the_left_end(left_px: int) -> None:
    columns = np.arange(panoramas.WIDTH_PX)
    pixels = np.zeros((panoramas.HEIGHT_PX, panoramas.WIDTH_PX, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = columns // 256, columns % 256
    pixels[..., 2] = (np.arange(panoramas.HEIGHT_PX) % 256)[:, None]
    part = np.asarray(panoramas.crop(Image.fromarray(pixels), left_px))
    np.testing.assert_array_equal(part, np.roll(pixels, -left_px, axis=1)[:, :512])


def test_a_panorama_of_another_size_is_broken() -> None:
    with pytest.raises(BrokenImageError, match="panorama of 1664 x 256 px; expected 3328 x 512"):
        panoramas.crop(Image.new("RGB", (1664, 256)), 0)
