"""A small city drawn by code: photos of places that look alike, for demos and fast benchmarks.

Streets run from west to east and the camera looks north at a row of house fronts. Photos of one place lie
within 7 m of each other and photos of different places at least 34 m apart, so the usual 25 m radius holds
exactly the photos of the place. Everything is drawn from its own ids alone (a house from seed, street and
house; a passer-by from seed, place, day and index), so neither more places nor more photos change a photo
that was there before. Cities of different seeds stand on the same ground: do not mix them by coordinates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, auto
from functools import partial

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray
from PIL import Image, ImageDraw

DATABASE_DAYS = (0, 1, 2)
QUERY_DAYS = (1000,)

_CITY_EAST_M, _CITY_NORTH_M, _UTM_ZONE = 447_000.0, 5_411_000.0, "32@U"
_PLACES_PER_STREET, _PLACE_SPACING_M, _STREET_SPACING_M = 20, 40.0, 120.0
_MAX_ALONG_M, _MAX_ACROSS_M, _MAX_TURN_DEG, _MAX_ZOOM_CHANGE = 3.0, 1.0, 4.0, 0.06

_LOT_M, _LOT_JITTER_M, _GROUND_FLOOR_M = 7.0, 1.8, 3.2
_STYLES_PER_CITY, _STYLES_PER_STREET = 6, 3

# Metres north of the line on which the camera walks.
_KERB_M, _FURNITURE_M, _FACADE_M = 9.5, 11.5, 16.0
_FURNITURE_SPACING_M, _LAMP_HEIGHT_M, _LAMP_REACH_M = 6.0, 4.6, 3.5

_EYE_HEIGHT_M = 1.6
_HORIZON = 0.7  # of the image height, from the top
_FOCAL = 0.62  # of the image width
_OVERSAMPLING = 2

_Colour = tuple[int, int, int]

_WALLS: tuple[_Colour, ...] = (
    (214, 196, 160),
    (196, 150, 110),
    (166, 94, 76),
    (226, 218, 204),
    (178, 182, 184),
    (186, 198, 170),
    (216, 172, 150),
    (204, 180, 112),
)
_ROOFS: tuple[_Colour, ...] = ((138, 72, 56), (92, 84, 84), (116, 92, 74), (72, 80, 92))
_TRIMS: tuple[_Colour, ...] = ((238, 234, 226), (150, 132, 112), (104, 98, 96))
_ACCENTS: tuple[_Colour, ...] = (
    (150, 40, 40),
    (40, 84, 60),
    (40, 60, 120),
    (92, 62, 40),
    (190, 140, 40),
    (110, 50, 100),
    (50, 120, 130),
    (60, 60, 64),
)
_CLOTHES: tuple[_Colour, ...] = ((40, 44, 60), (120, 40, 44), (200, 190, 170), (60, 90, 60), (30, 30, 30))
_CARS: tuple[_Colour, ...] = ((170, 172, 176), (40, 42, 46), (130, 30, 34), (40, 60, 110), (220, 220, 216))
_LEAVES: tuple[_Colour, ...] = ((66, 98, 48), (82, 114, 56), (54, 84, 44), (96, 122, 62))
_GLASS: _Colour = (70, 84, 100)
_LAMPLIGHT: _Colour = (255, 208, 130)
_METAL: _Colour = (58, 62, 62)
_ROAD: _Colour = (104, 102, 102)
_PAVEMENT: _Colour = (166, 160, 152)


class _Stream(IntEnum):
    """What a random stream is for: the second word of its seed."""

    STYLE = auto()
    STREET = auto()
    LOT = auto()
    HOUSE = auto()
    FURNITURE = auto()
    VIEWPOINT = auto()
    LIGHT = auto()
    PASSERS_BY = auto()
    EXPOSURE = auto()


class _Roof(IntEnum):
    FLAT = 0
    HIPPED = 1
    GABLE = 2
    MANSARD = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Photo:
    """One photo to be drawn: where the camera stood, which way it looked, and on which day."""

    seed: int
    place: int
    day: int
    index: int
    utm_east_m: float
    utm_north_m: float
    heading_deg: float
    zoom: float

    @property
    def path(self) -> str:
        """File name in the field's @-convention; it parses back to exactly the coordinates and heading."""
        note = f"s{self.seed:06d}p{self.place:06d}d{self.day:04d}i{self.index:03d}"
        position = f"{self.utm_east_m:010.2f}@{self.utm_north_m:010.2f}@{_UTM_ZONE}"
        return f"@{position}@@@@@{self.heading_deg:06.2f}@@@@@{note}@.jpg"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Style:
    """What houses of one style share."""

    wall: _Colour
    trim: _Colour
    roof_colour: _Colour
    roof: _Roof
    floor_m: float
    bay_m: float
    window_width: float  # of the bay
    window_height: float  # of the floor
    arched: bool
    shutters: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _House:
    """One house front: its style and what sets it apart from its neighbours."""

    west_m: float
    east_m: float
    style: _Style
    accent: _Colour
    floors: int
    door_bay: int
    balconies: frozenset[tuple[int, int]]  # (floor, bay)
    sign: tuple[float, ...]  # heights of the letters on the shop sign; empty without a shop
    awning: bool
    chimney: float  # position along the roof, 0 to 1

    @property
    def bays(self) -> int:
        return max(2, round((self.east_m - self.west_m) / self.style.bay_m))

    @property
    def eaves_m(self) -> float:
        return _GROUND_FLOOR_M + (self.floors - 1) * self.style.floor_m + 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Light:
    """The light of an hour: colours of the sky, strengths as factors of the surface colour."""

    sky_top: _Colour
    sky_low: _Colour
    ambient: tuple[float, float, float]
    sun: float
    lamps: float
    lit_windows: float
    contrast: float
    noise: float
    shadow_height_m: float = 0.0  # the sun reaches the fronts only above this


_DAYLIGHT = _Light(
    sky_top=(104, 156, 224),
    sky_low=(190, 214, 238),
    ambient=(0.62, 0.65, 0.74),
    sun=0.3,
    lamps=0.0,
    lit_windows=0.0,
    contrast=1.05,
    noise=0.012,
)
_OVERCAST = _Light(
    sky_top=(186, 190, 196),
    sky_low=(216, 216, 214),
    ambient=(0.78, 0.79, 0.80),
    sun=0.0,
    lamps=0.0,
    lit_windows=0.1,
    contrast=0.8,
    noise=0.018,
)
_DUSK = _Light(
    sky_top=(72, 74, 124),
    sky_low=(232, 156, 116),
    ambient=(0.62, 0.48, 0.50),
    sun=0.0,
    lamps=0.3,
    lit_windows=0.35,
    contrast=0.95,
    noise=0.03,
)
_NIGHT = _Light(
    sky_top=(20, 24, 46),
    sky_low=(46, 44, 60),
    ambient=(0.40, 0.40, 0.50),
    sun=0.0,
    lamps=0.75,
    lit_windows=0.2,
    contrast=1.0,
    noise=0.035,
)
_HOURS = (_DAYLIGHT, _DAYLIGHT, _DAYLIGHT, _OVERCAST, _OVERCAST, _OVERCAST, _DUSK, _NIGHT)


def database_photos(*, seed: int, num_places: int = 60, photos_per_place: int = 3) -> list[Photo]:
    """Photos of the days on which the city was mapped, sorted by path."""
    return photos(seed=seed, num_places=num_places, photos_per_place=photos_per_place, days=DATABASE_DAYS)


def query_photos(*, seed: int, num_places: int = 60, photos_per_place: int = 1) -> list[Photo]:
    """Photos of the same places on another day, sorted by path."""
    return photos(seed=seed, num_places=num_places, photos_per_place=photos_per_place, days=QUERY_DAYS)


def photos(*, seed: int, num_places: int, photos_per_place: int, days: Sequence[int]) -> list[Photo]:
    """Photos of places 0 to `num_places` - 1, taken on the given days in turn, sorted by path."""
    taken = [
        _photo(seed, place, days[index % len(days)], index)
        for place in range(num_places)
        for index in range(photos_per_place)
    ]
    return sorted(taken, key=lambda photo: photo.path)


def draw(photo: Photo, *, width_px: int, height_px: int) -> Image.Image:
    """The photo as an RGB image: the same bytes at any time, in any order, in any process."""
    light = _light(photo)
    canvas = _Canvas(photo, light, width_px=width_px * _OVERSAMPLING, height_px=height_px * _OVERSAMPLING)
    passers_by = _rng(photo.seed, _Stream.PASSERS_BY, photo.place, photo.day, photo.index)
    canvas.ground(0.0, _KERB_M, _ROAD)
    canvas.ground(_KERB_M, _FACADE_M, _PAVEMENT)
    for house in _visible_houses(photo, canvas):
        _draw_house(canvas, house, light, passers_by)
    things = [*_furniture(photo, canvas, light), *_people_and_cars(photo, canvas, passers_by)]
    for _, draw_thing in sorted(things, key=lambda thing: -thing[0]):
        draw_thing()
    return _develop(canvas, light, _rng(photo.seed, _Stream.EXPOSURE, photo.place, photo.day, photo.index))


def _rng(seed: int, stream: _Stream, *ids: int) -> Generator:
    return default_rng(SeedSequence((seed, int(stream), *ids)))


def _photo(seed: int, place: int, day: int, index: int) -> Photo:
    rng = _rng(seed, _Stream.VIEWPOINT, place, day, index)
    street, position = divmod(place, _PLACES_PER_STREET)
    along_m = (position + 1) * _PLACE_SPACING_M + rng.uniform(-_MAX_ALONG_M, _MAX_ALONG_M)
    across_m = street * _STREET_SPACING_M + rng.uniform(-_MAX_ACROSS_M, _MAX_ACROSS_M)
    # Rounded as the name is written, so that the name says exactly what is drawn.
    return Photo(
        seed=seed,
        place=place,
        day=day,
        index=index,
        utm_east_m=round(_CITY_EAST_M + along_m, 2),
        utm_north_m=round(_CITY_NORTH_M + across_m, 2),
        heading_deg=round(rng.uniform(-_MAX_TURN_DEG, _MAX_TURN_DEG) % 360.0, 2) % 360.0,
        zoom=rng.uniform(1.0 - _MAX_ZOOM_CHANGE, 1.0 + _MAX_ZOOM_CHANGE),
    )


def _street(photo: Photo) -> int:
    return photo.place // _PLACES_PER_STREET


class _Canvas:
    """Draws shapes of one street as one camera sees them.

    Positions are metres east of the city's corner, metres north of the street's camera line and metres above
    ground. The image's alpha channel says how much of a colour shines by itself, whatever the light.
    """

    def __init__(self, photo: Photo, light: _Light, *, width_px: int, height_px: int) -> None:
        self.width_px, self.height_px = width_px, height_px
        self.lamps: list[tuple[float, float, float]] = []  # column, row, pixels per metre
        self._east_m = photo.utm_east_m - _CITY_EAST_M
        self._north_m = photo.utm_north_m - _CITY_NORTH_M - _street(photo) * _STREET_SPACING_M
        heading_rad = math.radians(photo.heading_deg)
        self._sin, self._cos = math.sin(heading_rad), math.cos(heading_rad)
        self._focal_px = _FOCAL * width_px * photo.zoom
        self._horizon_px = _HORIZON * height_px
        self.image = Image.fromarray(_sky(light, width_px, height_px))
        self._pen = ImageDraw.Draw(self.image)

    def visible_m(self, north_m: float) -> tuple[float, float]:
        """The westernmost and easternmost metre in view at this distance."""
        heading_rad = math.atan2(self._sin, self._cos)
        half_view_rad = math.atan(0.5 * self.width_px / self._focal_px)
        ahead_m = north_m - self._north_m
        west_m = self._east_m + ahead_m * math.tan(heading_rad - half_view_rad)
        return west_m, self._east_m + ahead_m * math.tan(heading_rad + half_view_rad)

    def column(self, east_m: float, north_m: float) -> tuple[float, float]:
        """Image column of an upright line, and pixels per metre along it."""
        right_m, ahead_m = east_m - self._east_m, north_m - self._north_m
        scale = self._focal_px / (right_m * self._sin + ahead_m * self._cos)
        return 0.5 * self.width_px + (right_m * self._cos - ahead_m * self._sin) * scale, scale

    def row(self, height_m: float, scale: float) -> float:
        """Image row of a height on an upright line with `scale` pixels per metre."""
        return self._horizon_px - (height_m - _EYE_HEIGHT_M) * scale

    def polygon(
        self, corners_m: Sequence[tuple[float, float]], north_m: float, colour: _Colour, *, shine: float = 0.0
    ) -> None:
        """An upright shape with (east, height) corners."""
        points: list[tuple[float, float]] = []
        for east_m, height_m in corners_m:
            column_px, scale = self.column(east_m, north_m)
            points.append((column_px, self.row(height_m, scale)))
        self._pen.polygon(points, fill=(*colour, round(255 * shine)))

    def box(
        self,
        east_m: tuple[float, float],
        height_m: tuple[float, float],
        north_m: float,
        colour: _Colour,
        *,
        shine: float = 0.0,
    ) -> None:
        """An upright rectangle between two east coordinates and two heights."""
        (west_px, west_scale), (east_px, east_scale) = (self.column(east, north_m) for east in east_m)
        low_m, high_m = height_m
        points = (
            (west_px, self.row(low_m, west_scale)),
            (east_px, self.row(low_m, east_scale)),
            (east_px, self.row(high_m, east_scale)),
            (west_px, self.row(high_m, west_scale)),
        )
        self._pen.polygon(points, fill=(*colour, round(255 * shine)))

    def disc(
        self,
        middle_m: tuple[float, float],
        radius_m: float,
        north_m: float,
        colour: _Colour,
        *,
        shine: float = 0.0,
    ) -> None:
        """A ball seen as a disc, around an (east, height) middle."""
        east_m, height_m = middle_m
        column_px, scale = self.column(east_m, north_m)
        row_px, radius_px = self.row(height_m, scale), radius_m * scale
        bounds = (column_px - radius_px, row_px - radius_px, column_px + radius_px, row_px + radius_px)
        self._pen.ellipse(bounds, fill=(*colour, round(255 * shine)))

    def ground(self, near_m: float, far_m: float, colour: _Colour) -> None:
        """The ground between two distances, over the whole width of the image."""
        near_m = max(near_m, self._north_m + 3.0)
        points: list[tuple[float, float]] = []
        for north_m, sides in ((far_m, (0, 1)), (near_m, (1, 0))):
            ends_m = self.visible_m(north_m)
            for side in sides:
                column_px, scale = self.column(ends_m[side], north_m)
                points.append((column_px, self.row(0.0, scale)))
        self._pen.polygon(points, fill=(*colour, 0))

    def add_lamp(self, east_m: float, height_m: float, north_m: float) -> None:
        """A lamp that lights its surroundings when the photo is developed."""
        column_px, scale = self.column(east_m, north_m)
        self.lamps.append((column_px, self.row(height_m, scale), scale))


def _sky(light: _Light, width_px: int, height_px: int) -> NDArray[np.uint8]:
    fraction = np.minimum(np.linspace(0.0, 1.0 / _HORIZON, height_px), 1.0)[:, None]
    rows = (1.0 - fraction) * np.array(light.sky_top) + fraction * np.array(light.sky_low)
    sky = np.full((height_px, width_px, 4), 255, dtype=np.uint8)
    sky[..., :3] = rows[:, None, :]
    return sky


def _light(photo: Photo) -> _Light:
    """One light per place and day, as the walk through the city lasts from morning to night."""
    rng = _rng(photo.seed, _Stream.LIGHT, photo.place, photo.day)
    light = _HOURS[rng.integers(len(_HOURS))]
    strength, warmth = rng.uniform(0.85, 1.15), rng.uniform(-0.06, 0.06)
    red, green, blue = light.ambient
    ambient = (strength * red * (1 + warmth), strength * green, strength * blue * (1 - warmth))
    return replace(light, ambient=ambient, shadow_height_m=rng.uniform(-2.0, 9.0))


def _style(seed: int, style: int) -> _Style:
    rng = _rng(seed, _Stream.STYLE, style)
    return _Style(
        wall=_WALLS[rng.integers(len(_WALLS))],
        trim=_TRIMS[rng.integers(len(_TRIMS))],
        roof_colour=_ROOFS[rng.integers(len(_ROOFS))],
        roof=_Roof(rng.integers(len(_Roof))),
        floor_m=rng.uniform(2.6, 3.1),
        bay_m=rng.uniform(1.7, 2.8),
        window_width=rng.uniform(0.38, 0.6),
        window_height=rng.uniform(0.5, 0.68),
        arched=bool(rng.random() < 0.3),
        shutters=bool(rng.random() < 0.4),
    )


def _house_edge_m(seed: int, street: int, lot: int) -> float:
    return lot * _LOT_M + _rng(seed, _Stream.LOT, street, lot).uniform(-_LOT_JITTER_M, _LOT_JITTER_M)


def _house(seed: int, street: int, lot: int) -> _House:
    street_rng = _rng(seed, _Stream.STREET, street)
    styles = street_rng.choice(_STYLES_PER_CITY, size=_STYLES_PER_STREET, replace=False)
    usual_floors = int(street_rng.integers(2, 5))
    rng = _rng(seed, _Stream.HOUSE, street, lot)
    style = _style(seed, int(styles[rng.integers(_STYLES_PER_STREET)]))
    shade = rng.uniform(0.93, 1.05)
    red, green, blue = (min(255, round(shade * channel)) for channel in style.wall)
    floors = max(2, usual_floors + int(rng.integers(-1, 2)))
    cells = [(floor, bay) for floor in range(1, floors) for bay in range(4)]
    balconies = frozenset(cell for cell in cells if rng.random() < 0.15)
    has_shop = rng.random() < 0.45
    return _House(
        west_m=_house_edge_m(seed, street, lot),
        east_m=_house_edge_m(seed, street, lot + 1),
        style=replace(style, wall=(red, green, blue)),
        accent=_ACCENTS[rng.integers(len(_ACCENTS))],
        floors=floors,
        door_bay=int(rng.integers(0, 3)),
        balconies=balconies,
        awning=bool(rng.random() < 0.5),
        chimney=rng.uniform(0.1, 0.9),
        sign=tuple(rng.uniform(0.25, 1.0, size=rng.integers(4, 9))) if has_shop else (),
    )


def _visible_houses(photo: Photo, canvas: _Canvas) -> Iterator[_House]:
    west_m, east_m = canvas.visible_m(_FACADE_M)
    first = math.floor((west_m - _LOT_JITTER_M) / _LOT_M) - 1
    last = math.ceil((east_m + _LOT_JITTER_M) / _LOT_M)
    return (_house(photo.seed, _street(photo), lot) for lot in range(first, last + 1))


def _draw_house(canvas: _Canvas, house: _House, light: _Light, passers_by: Generator) -> None:
    style, sides_m = house.style, (house.west_m, house.east_m)
    _draw_roof(canvas, house)
    canvas.box(sides_m, (0.0, house.eaves_m), _FACADE_M, style.wall)
    canvas.box(sides_m, (0.0, 0.5), _FACADE_M, _darker(style.wall, 0.72))
    canvas.box(sides_m, (_GROUND_FLOOR_M - 0.1, _GROUND_FLOOR_M + 0.1), _FACADE_M, style.trim)
    canvas.box((house.east_m - 0.12, house.east_m), (0.0, house.eaves_m), _FACADE_M, _darker(style.wall, 0.6))
    bay_m = (house.east_m - house.west_m) / house.bays
    for bay in range(house.bays):
        middle_m = house.west_m + (bay + 0.5) * bay_m
        for floor in range(1, house.floors):
            sill_m = _GROUND_FLOOR_M + (floor - 1) * style.floor_m + 0.7
            _draw_window(canvas, house, middle_m, sill_m, shine=_window_shine(light, passers_by))
            if (floor, bay) in house.balconies:
                _draw_balcony(canvas, middle_m, sill_m - 0.6, half_width_m=0.48 * bay_m)
        if bay == house.door_bay % house.bays:
            _draw_door(canvas, house, middle_m)
        elif not house.sign:
            _draw_window(canvas, house, middle_m, 0.9, shine=_window_shine(light, passers_by))
    if house.sign:
        _draw_shop(canvas, house, bay_m, light)


def _draw_roof(canvas: _Canvas, house: _House) -> None:
    west_m, east_m, eaves_m, style = house.west_m, house.east_m, house.eaves_m, house.style
    colour, middle_m = style.roof_colour, 0.5 * (west_m + east_m)
    chimney_m = west_m + house.chimney * (east_m - west_m - 0.8)
    chimney_top_m = eaves_m + (1.5 if style.roof == _Roof.FLAT else 3.0)
    canvas.box((chimney_m, chimney_m + 0.8), (eaves_m, chimney_top_m), _FACADE_M, _darker(_ROOFS[0], 0.8))
    if style.roof == _Roof.FLAT:
        canvas.box((west_m, east_m), (eaves_m, eaves_m + 0.5), _FACADE_M, style.trim)
    elif style.roof == _Roof.HIPPED:
        ridge = ((west_m + 0.8, eaves_m + 2.2), (east_m - 0.8, eaves_m + 2.2))
        canvas.polygon(((west_m, eaves_m), *ridge, (east_m, eaves_m)), _FACADE_M, colour)
    elif style.roof == _Roof.GABLE:
        top_m = eaves_m + 0.42 * (east_m - west_m)
        gable = ((west_m, eaves_m), (middle_m, top_m), (east_m, eaves_m))
        canvas.polygon(gable, _FACADE_M, colour)
        inner = ((west_m + 0.5, eaves_m), (middle_m, top_m - 0.45), (east_m - 0.5, eaves_m))
        canvas.polygon(inner, _FACADE_M, style.wall)
        canvas.disc((middle_m, eaves_m + 1.2), 0.45, _FACADE_M, _GLASS)
    else:
        edge = ((west_m + 0.4, eaves_m + 2.4), (east_m - 0.4, eaves_m + 2.4))
        canvas.polygon(((west_m, eaves_m), *edge, (east_m, eaves_m)), _FACADE_M, colour)
        for side in (-1, 1):
            dormer_m = middle_m + side * 0.24 * (east_m - west_m)
            for half_m, inset_m, surface in ((0.6, 0.3, style.trim), (0.4, 0.5, _GLASS)):
                heights_m = (eaves_m + inset_m, eaves_m + 2.1 - inset_m)
                canvas.box((dormer_m - half_m, dormer_m + half_m), heights_m, _FACADE_M, surface)


def _window_shine(light: _Light, passers_by: Generator) -> float:
    return 0.8 if passers_by.random() < light.lit_windows else 0.0


def _draw_window(canvas: _Canvas, house: _House, middle_m: float, sill_m: float, *, shine: float) -> None:
    style = house.style
    half_m = 0.5 * style.window_width * (house.east_m - house.west_m) / house.bays
    top_m = sill_m + style.window_height * style.floor_m
    if style.shutters:
        shutters_m = (middle_m - 1.7 * half_m, middle_m + 1.7 * half_m)
        canvas.box(shutters_m, (sill_m, top_m), _FACADE_M, house.accent)
    frame_m = (middle_m - half_m - 0.12, middle_m + half_m + 0.12)
    canvas.box(frame_m, (sill_m - 0.15, top_m + 0.1), _FACADE_M, style.trim)
    glass = _LAMPLIGHT if shine else _GLASS
    if style.arched:
        canvas.disc((middle_m, top_m), half_m + 0.12, _FACADE_M, style.trim)
        canvas.disc((middle_m, top_m), half_m, _FACADE_M, glass, shine=shine)
    canvas.box((middle_m - half_m, middle_m + half_m), (sill_m, top_m), _FACADE_M, glass, shine=shine)
    canvas.box((middle_m - 0.05, middle_m + 0.05), (sill_m, top_m), _FACADE_M, style.trim)


def _draw_balcony(canvas: _Canvas, middle_m: float, floor_m: float, *, half_width_m: float) -> None:
    west_m, east_m, rail_m = middle_m - half_width_m, middle_m + half_width_m, floor_m + 1.0
    canvas.box((west_m, east_m), (floor_m - 0.2, floor_m + 0.05), _FACADE_M, (150, 146, 140))
    canvas.box((west_m, east_m), (rail_m - 0.12, rail_m), _FACADE_M, _METAL)
    for post in range(6):
        post_m = west_m + post * (east_m - west_m - 0.08) / 5
        canvas.box((post_m, post_m + 0.08), (floor_m, rail_m), _FACADE_M, _METAL)


def _draw_door(canvas: _Canvas, house: _House, middle_m: float) -> None:
    canvas.box((middle_m - 0.7, middle_m + 0.7), (0.0, 2.6), _FACADE_M, house.style.trim)
    canvas.box((middle_m - 0.55, middle_m + 0.55), (0.1, 2.1), _FACADE_M, house.accent)
    canvas.box((middle_m - 0.55, middle_m + 0.55), (2.15, 2.5), _FACADE_M, _GLASS)


def _draw_shop(canvas: _Canvas, house: _House, bay_m: float, light: _Light) -> None:
    """A shop window on the wider side of the door, below a sign with the house's own lettering."""
    door_west_m = house.west_m + (house.door_bay % house.bays) * bay_m
    if door_west_m - house.west_m > house.east_m - door_west_m - bay_m:
        west_m, east_m = house.west_m + 0.4, door_west_m
    else:
        west_m, east_m = door_west_m + bay_m, house.east_m - 0.4
    canvas.box((west_m, east_m), (0.5, 2.4), _FACADE_M, _GLASS, shine=0.3 * light.lamps)
    canvas.box((west_m, east_m), (2.45, 3.25), _FACADE_M, house.accent, shine=0.5 * light.lamps)
    pitch_m = (east_m - west_m) / (len(house.sign) + 1)
    for letter, height in enumerate(house.sign):
        letter_m = west_m + (letter + 0.7) * pitch_m
        sides_m = (letter_m, letter_m + 0.55 * pitch_m)
        canvas.box(sides_m, (2.55, 2.55 + 0.6 * height), _FACADE_M, (240, 236, 220), shine=light.lamps)
    if house.awning:
        for stripe in range(8):
            colour = house.accent if stripe % 2 else (236, 230, 220)
            stripe_m = west_m + stripe * (east_m - west_m) / 8
            sides_m = (stripe_m, stripe_m + (east_m - west_m) / 8)
            canvas.box(sides_m, (1.85, 2.5), _FACADE_M - 1.0, colour)


_Thing = tuple[float, Callable[[], None]]  # metres north, what draws it


def _furniture(photo: Photo, canvas: _Canvas, light: _Light) -> Iterator[_Thing]:
    """Trees, lamps and posts along the kerb, the same in all photos."""
    west_m, east_m = canvas.visible_m(_FURNITURE_M)
    margin_m = 3.0
    first = math.floor((west_m - margin_m) / _FURNITURE_SPACING_M)
    last = math.ceil((east_m + margin_m) / _FURNITURE_SPACING_M)
    for slot in range(first, last + 1):
        rng = _rng(photo.seed, _Stream.FURNITURE, _street(photo), slot)
        at_m = slot * _FURNITURE_SPACING_M + rng.uniform(-2.0, 2.0)
        kind = rng.random()
        if kind < 0.25:
            yield _FURNITURE_M, partial(_draw_tree, canvas, at_m, rng)
        elif kind < 0.45:
            yield _FURNITURE_M, partial(_draw_lamp, canvas, at_m, light)
        elif kind < 0.6:
            yield _FURNITURE_M, partial(_draw_posts, canvas, at_m)


def _draw_tree(canvas: _Canvas, at_m: float, rng: Generator) -> None:
    crown_m, spread_m = rng.uniform(3.6, 5.2), rng.uniform(0.8, 1.4)
    canvas.box((at_m - 0.13, at_m + 0.13), (0.0, crown_m), _FURNITURE_M, (84, 66, 50))
    for leaf in range(9):
        angle_rad, reach_m = rng.uniform(0.0, 2.0 * math.pi), spread_m * rng.uniform(0.3, 1.0)
        middle_m = (at_m + reach_m * math.cos(angle_rad), crown_m + reach_m * math.sin(angle_rad))
        canvas.disc(middle_m, rng.uniform(0.4, 0.75), _FURNITURE_M, _LEAVES[leaf % len(_LEAVES)])


def _draw_lamp(canvas: _Canvas, at_m: float, light: _Light) -> None:
    canvas.box((at_m - 0.07, at_m + 0.07), (0.0, _LAMP_HEIGHT_M), _FURNITURE_M, _METAL)
    colour = _LAMPLIGHT if light.lamps else (220, 220, 214)
    canvas.disc((at_m, _LAMP_HEIGHT_M), 0.25, _FURNITURE_M, colour, shine=min(1.0, 2.0 * light.lamps))
    canvas.add_lamp(at_m, _LAMP_HEIGHT_M, _FURNITURE_M)


def _draw_posts(canvas: _Canvas, at_m: float) -> None:
    for post in range(4):
        post_m = at_m + 0.9 * post
        canvas.box((post_m, post_m + 0.14), (0.0, 0.9), _FURNITURE_M, _METAL)


def _people_and_cars(photo: Photo, canvas: _Canvas, rng: Generator) -> Iterator[_Thing]:
    """What only this photo shows."""
    for _ in range(rng.integers(0, 5)):
        north_m = rng.uniform(6.0, _FACADE_M - 0.5)
        at_m = rng.uniform(*canvas.visible_m(north_m))
        coat, trousers = (_CLOTHES[choice] for choice in rng.choice(len(_CLOTHES), size=2))
        yield north_m, partial(_draw_person, canvas, at_m, north_m, coat, trousers)
    kerb_m = _KERB_M - 1.2
    for _ in range(rng.integers(0, 3)):
        at_m = rng.uniform(*canvas.visible_m(kerb_m))
        colour, height_m = _CARS[rng.integers(len(_CARS))], rng.choice((1.45, 1.5, 2.1))
        yield kerb_m, partial(_draw_car, canvas, at_m, kerb_m, float(height_m), colour)


def _draw_person(canvas: _Canvas, at_m: float, north_m: float, coat: _Colour, trousers: _Colour) -> None:
    canvas.box((at_m - 0.16, at_m + 0.16), (0.0, 0.85), north_m, trousers)
    canvas.box((at_m - 0.24, at_m + 0.24), (0.8, 1.48), north_m, coat)
    canvas.disc((at_m, 1.62), 0.13, north_m, (206, 164, 138))


def _draw_car(canvas: _Canvas, at_m: float, north_m: float, height_m: float, colour: _Colour) -> None:
    canvas.box((at_m - 2.1, at_m + 2.1), (0.3, 0.9), north_m, colour)
    roof = ((at_m - 1.1, height_m), (at_m + 1.0, height_m))
    canvas.polygon(((at_m - 1.8, 0.9), *roof, (at_m + 1.6, 0.9)), north_m, colour)
    glass = ((at_m - 1.0, height_m - 0.1), (at_m + 0.9, height_m - 0.1))
    canvas.polygon(((at_m - 1.5, 0.9), *glass, (at_m + 1.35, 0.9)), north_m, _GLASS)
    for wheel_m in (at_m - 1.35, at_m + 1.35):
        canvas.disc((wheel_m, 0.32), 0.34, north_m, (28, 28, 30))


def _darker(colour: _Colour, factor: float) -> _Colour:
    red, green, blue = colour
    return round(factor * red), round(factor * green), round(factor * blue)


def _develop(canvas: _Canvas, light: _Light, rng: Generator) -> Image.Image:
    """Light the drawn surfaces, then expose the picture: brightness, contrast and noise."""
    scene = _averaged(np.asarray(canvas.image))
    surface, shine = scene[..., :3], scene[..., 3:]
    height_px, width_px, _ = surface.shape
    picture = surface * (shine + (1.0 - shine) * _illumination(canvas, light, height_px, width_px))
    exposed = (picture - 0.5) * (255.0 * light.contrast) + 127.5
    exposed *= rng.uniform(0.85, 1.15)
    exposed += 255.0 * light.noise * rng.standard_normal(exposed.shape, dtype=np.float32)
    return Image.fromarray(np.clip(exposed, 0.0, 255.0).astype(np.uint8))


def _averaged(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Averages of square blocks of pixels, from 0 to 1."""
    step = _OVERSAMPLING
    total = np.zeros((pixels.shape[0] // step, pixels.shape[1] // step, pixels.shape[2]), dtype=np.float32)
    for row in range(step):
        for column in range(step):
            total += pixels[row::step, column::step]
    return total / np.float32(255.0 * step * step)


def _illumination(canvas: _Canvas, light: _Light, height_px: int, width_px: int) -> NDArray[np.float32]:
    """Factor for each pixel and colour: the sky, the sun above the shadow's edge, pools of lamplight."""
    rows, columns = (_OVERSAMPLING * (np.arange(size) + 0.5) for size in (height_px, width_px))
    illumination = np.empty((height_px, width_px, 3), dtype=np.float32)
    illumination[...] = light.ambient
    _, facade_scale = canvas.column(sum(canvas.visible_m(_FACADE_M)) / 2, _FACADE_M)
    illumination[rows < canvas.row(light.shadow_height_m, facade_scale)] += light.sun
    warm = np.array(_LAMPLIGHT, dtype=np.float32) / 255.0
    for column_px, row_px, scale in canvas.lamps if light.lamps else ():
        reach_px = _LAMP_REACH_M * scale
        across = np.exp(-0.5 * ((columns - column_px) / reach_px) ** 2).astype(np.float32)
        down = np.exp(-0.5 * ((rows - row_px) / reach_px) ** 2).astype(np.float32)
        illumination += np.float32(light.lamps) * down[:, None, None] * across[:, None] * warm
    return illumination
