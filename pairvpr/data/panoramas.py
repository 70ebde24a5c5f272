"""SF-XL panoramas: parse their names, choose view directions, and crop (method, section 4).

n = number of panoramas. Positions are UTM (east, north) in metres. Angles are in degrees: viewing angles clockwise from
north. The middle column of a panorama looks along its yaw.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from pairvpr.data.images import BrokenImageError
from pairvpr.errors import UserError

WIDTH_PX, HEIGHT_PX = 3328, 512
CROP_WIDTH_PX = 512
CELL_SIZE_M = 15

MAX_ROTATION_DEG = 359
MIN_FOCAL_DISTANCE_M, MAX_FOCAL_DISTANCE_M = 10, 20

MIN_DIFFERENCE_DEG, MAX_DIFFERENCE_DEG = 3.0, 50.0
NUM_DRAWS, NUM_STRICT_DRAWS = 10, 4
RELAXED_MIN_DIFFERENCE_DEG = 0.1

_NUMBER = r"-?\d+(?:\.\d+)?"
# Split at "@", field 0 (before the first "@") is empty, 1 is east, 2 north and 9 the yaw.
_NAME = rf"(?:^|/)@(?P<east>{_NUMBER})@(?P<north>{_NUMBER})@(?:[^@/]*@){{6}}(?P<yaw>{_NUMBER})@[^/]*$"


def parse_names(paths: pa.Array, where: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Positions (n, 2) and yaws (n,) from names `@utm_east@utm_north@...`; `paths` are strings.

    Raises `UserError`, naming `where` and the first such path, for a name without them.
    """
    fields = pc.call_function("extract_regex", [paths], pc.ExtractRegexOptions(_NAME))
    if fields.null_count:
        path = paths[pc.index(fields.is_null(), True).as_py()].as_py()
        raise UserError(
            f"{where}: {path} is not the name of a panorama; expected @utm_east@utm_north@... with the yaw in field 9"
        )
    east_m, north_m, yaw_deg = (pc.cast(fields.field(i), pa.float64()).to_numpy(zero_copy_only=False) for i in range(3))
    return np.stack([east_m, north_m], axis=1), yaw_deg


def cells_m(utm_m: NDArray[np.float64]) -> NDArray[np.int64]:
    """South-west corners (n, 2), multiples of `CELL_SIZE_M`, of the square cells that contain positions (n, 2)."""
    return np.floor_divide(utm_m, CELL_SIZE_M).astype(np.int64) * CELL_SIZE_M


def second_axis(utm_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """Unit vector (2,) along which positions (n, 2) vary least; arbitrary if all directions vary equally."""
    east_m, north_m = (utm_m - utm_m.mean(axis=0)).T
    # The angle of the first axis in closed form: the sign of a library's eigenvectors depends on the machine.
    angle_rad = 0.5 * np.arctan2(2.0 * (east_m @ north_m), east_m @ east_m - north_m @ north_m)
    return np.array([-np.sin(angle_rad), np.cos(angle_rad)])


def focal_point(utm_m: NDArray[np.float64], rotation_deg: float, distance_m: float) -> NDArray[np.float64]:
    """The point (2,) to look at from positions (n, 2): `distance_m` from their mean, along the turned second axis."""
    angle_rad = np.deg2rad(rotation_deg)
    east, north = second_axis(utm_m)
    turned = (
        np.cos(angle_rad) * east - np.sin(angle_rad) * north,
        np.sin(angle_rad) * east + np.cos(angle_rad) * north,
    )
    return utm_m.mean(axis=0) + distance_m * np.array(turned)


def draw_focal_point(utm_m: NDArray[np.float64], rng: Generator) -> NDArray[np.float64]:
    """A focal point (2,) for panoramas at `utm_m` (n, 2), at an integer angle and distance."""
    rotation_deg = rng.integers(0, MAX_ROTATION_DEG, endpoint=True)
    distance_m = rng.integers(MIN_FOCAL_DISTANCE_M, MAX_FOCAL_DISTANCE_M, endpoint=True)
    return focal_point(utm_m, float(rotation_deg), float(distance_m))


def viewing_angles_deg(utm_m: NDArray[np.float64], focal_m: NDArray[np.float64]) -> NDArray[np.float64]:
    """Viewing angles (n,), from 0 to 360, from positions (n, 2) to the focal point (2,)."""
    east_m, north_m = (focal_m - utm_m).T
    return np.rad2deg(np.arctan2(east_m, north_m)) % 360.0


def differences_deg(angle_deg: float, others_deg: NDArray[np.float64]) -> NDArray[np.float64]:
    """Differences between an angle and others (n,): 0 to 180."""
    return np.abs((angle_deg - others_deg + 180.0) % 360.0 - 180.0)


def left_edges_px(yaws_deg: ArrayLike, angles_deg: ArrayLike) -> NDArray[np.int64]:
    """First columns (n,) of crops centred on viewing angles (n,) in panoramas with yaws (n,)."""
    yaws_deg, angles_deg = np.asarray(yaws_deg, np.float64), np.asarray(angles_deg, np.float64)
    # Each term is truncated before they are added.
    north_px = ((180.0 - yaws_deg) % 360.0 / 360.0 * WIDTH_PX).astype(np.int64)
    turn_px = (angles_deg / 360.0 * WIDTH_PX).astype(np.int64)
    return (north_px + turn_px - CROP_WIDTH_PX // 2) % WIDTH_PX


def draw_second(first_deg: float, others_deg: NDArray[np.float64], rng: Generator) -> int:
    """Index of the view (of n > 0 viewing angles) to pair with the first.

    The draw is repeated while the angles differ by too little or too much. From the fifth draw on, any non-negligible
    difference is accepted; the last draw is always accepted.
    """
    differences = differences_deg(first_deg, others_deg)
    choice = 0
    for draw in range(NUM_DRAWS):
        choice = int(rng.integers(len(differences)))
        difference = differences[choice]
        relaxed = draw >= NUM_STRICT_DRAWS and difference > RELAXED_MIN_DIFFERENCE_DEG
        if relaxed or MIN_DIFFERENCE_DEG <= difference <= MAX_DIFFERENCE_DEG:
            break
    return choice


def crop(panorama: Image.Image, left_px: int) -> Image.Image:
    """A crop of a panorama, `CROP_WIDTH_PX` wide, from column `left_px` on; it wraps around at the right edge.

    Raises `BrokenImageError` if the panorama does not have the expected size.
    """
    if panorama.size != (WIDTH_PX, HEIGHT_PX):
        width_px, height_px = panorama.size
        raise BrokenImageError(f"panorama of {width_px} x {height_px} px; expected {WIDTH_PX} x {HEIGHT_PX}")
    right_px = left_px + CROP_WIDTH_PX
    part = panorama.crop((left_px, 0, min(right_px, WIDTH_PX), HEIGHT_PX))
    if right_px <= WIDTH_PX:
        return part
    whole = Image.new(panorama.mode, (CROP_WIDTH_PX, HEIGHT_PX))
    whole.paste(part, (0, 0))
    whole.paste(panorama.crop((0, 0, right_px - WIDTH_PX, HEIGHT_PX)), (part.width, 0))
    return whole
