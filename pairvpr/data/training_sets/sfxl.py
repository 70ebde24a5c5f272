"""SF-XL: panoramas of San Francisco; two views of a place look at the same point (method, section 4).

Layout: `panoramas/` has files named `@utm_east@utm_north@...`. A place is a square cell with enough panoramas. The
grouping into cells is computed once and kept in the caller's cache directory. If the published grouping is next to
`panoramas/`, it is used instead, and the folder is not listed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeGuard

import numpy as np
import pyarrow as pa
from numpy.random import Generator
from numpy.typing import NDArray
from pyarrow import compute

from pairvpr.data import panoramas, sealed, storage
from pairvpr.data.photo_listing import photos_among
from pairvpr.data.training_sets.base import View
from pairvpr.data.training_sets.places import digest, group, offsets_of
from pairvpr.errors import UserError

pc: Any = compute  # its functions are generated at run time, so their types are unknown

MIN_PANORAMAS = 5
FOLDER = "panoramas"
PUBLISHED_GROUPING = f"sfxl_M{panoramas.CELL_SIZE_M}_N1_mipc{MIN_PANORAMAS}.torch"

CACHE_SCHEMA = pa.schema(
    [
        ("place", pa.int64()),
        ("path", pa.large_string()),
        ("utm_east_m", pa.float64()),
        ("utm_north_m", pa.float64()),
        ("yaw_deg", pa.float64()),
    ]
)
_CACHE_VERSION = 1
_NUM_HASHED_AT_ONCE = 1 << 16
_Cell = tuple[int, int]
_Grouping = tuple[Sequence[Sequence[_Cell]], Mapping[_Cell, Sequence[str]]]


@dataclass(frozen=True, eq=False)
class SfXl:
    """Cells, ordered by coordinates (or as in the published grouping).

    Place i is the panoramas from `offsets[i]` to `offsets[i + 1]` - 1: `paths` below `root`/panoramas, positions
    `utm_m` (n, 2) and `yaw_deg` (n,).
    """

    root: str
    paths: pa.LargeStringArray
    utm_m: NDArray[np.float64]
    yaw_deg: NDArray[np.float64]
    offsets: NDArray[np.int64]

    @property
    def name(self) -> str:
        """As in `train.datasets`."""
        return "sfxl"

    def __len__(self) -> int:
        """Number of cells."""
        return len(self.offsets) - 1

    @property
    def places_sha256(self) -> str:
        """See `TrainingSet.places_sha256`; positions and yaws are in the paths."""
        return self._places_sha256

    @cached_property
    def _places_sha256(self) -> str:
        return digest(self.offsets, self.paths)

    def draw(self, place: int, count: int, rng: Generator, broken: Collection[str] = ()) -> list[View]:
        """Crops of two panoramas of a cell that look at one point; fewer if the others are in `broken`."""
        assert count == 2, "SF-XL answers with pairs: the views of more would not look at one another's point"
        first_row, end = self.offsets[place : place + 2].tolist()
        utm_m = self.utm_m[first_row:end]
        urls = [storage.join(self.root, FOLDER, path) for path in self.paths[first_row:end].to_pylist()]
        angles_deg = panoramas.viewing_angles_deg(utm_m, panoramas.draw_focal_point(utm_m, rng))
        lefts_px = panoramas.left_edges_px(self.yaw_deg[first_row:end], angles_deg)
        usable = [i for i, url in enumerate(urls) if url not in broken]
        chosen = [usable.pop(int(rng.integers(len(usable))))] if usable else []
        if usable:
            chosen.append(usable[panoramas.draw_second(float(angles_deg[chosen[0]]), angles_deg[usable], rng)])
        return [View(urls[i], int(lefts_px[i])) for i in chosen]


def read_sfxl(root: str, cache_directory: str) -> SfXl:
    """Cells with at least `MIN_PANORAMAS` panoramas.

    Raises `UserError`, naming the file or folder, if the layout differs or there is no such cell.
    """
    root = storage.absolute(root)
    published = storage.join(root, PUBLISHED_GROUPING)
    if storage.exists(published):
        cache = storage.join(cache_directory, f"sfxl_{_key(storage.sha256(published).encode())}.parquet")
        return _cached(cache, root, lambda: _places_of_published(published))
    folder = storage.join(root, FOLDER)
    paths = _list_panoramas(folder)
    cache = storage.join(cache_directory, f"sfxl_{_key_of_paths(paths)}.parquet")
    return _cached(cache, root, lambda: _places_by_cell(folder, paths))


def _list_panoramas(folder: str) -> pa.LargeStringArray:
    """Paths of all photos below a folder, relative to it and sorted."""
    try:
        files = storage.list_files(folder)
    except OSError as error:
        raise UserError(f"{folder}: can't be read: {storage.reason(error)}") from error
    try:
        paths = pa.array(photos_among(files).photos, pa.large_string())
    except UnicodeEncodeError as error:
        raise UserError(f"{folder}: the name {error.object!a} is not UTF-8; expected UTF-8 names") from error
    if not len(paths):
        what = "no photo in it" if storage.exists(folder) else "no such folder"
        raise UserError(f"{folder}: {what}; expected the panoramas of SF-XL")
    return paths


def _places_by_cell(folder: str, paths: pa.LargeStringArray) -> pa.Table:
    """Cells with enough panoramas, from their names; see `_table`."""
    utm_m, yaw_deg = panoramas.parse_names(paths, folder)
    east, north = (panoramas.cells_m(utm_m) // panoramas.CELL_SIZE_M).T
    num_rows_of_cells = north.max() - north.min() + 1
    places = group(east * num_rows_of_cells + (north - north.min()), MIN_PANORAMAS)
    if not len(places.rows):
        size = f"{panoramas.CELL_SIZE_M} m x {panoramas.CELL_SIZE_M} m"
        raise UserError(
            f"{folder}: no cell of {size} has {MIN_PANORAMAS} of the {len(paths)} panoramas; expected SF-XL"
        )
    paths_of_places = paths.take(pa.array(places.rows))
    return _table(paths_of_places, utm_m[places.rows], yaw_deg[places.rows], np.diff(places.offsets))


def _places_of_published(url: str) -> pa.Table:
    """Cells and paths from the published grouping; see `_table`."""
    groups, paths_of_cell = _read_published(url)
    lists = [paths_of_cell[cell] for cells in groups for cell in cells]
    paths = pa.array((path for paths in lists for path in paths), pa.large_string())
    return _table(paths, *panoramas.parse_names(paths, url), np.array([len(paths) for paths in lists]))


def _read_published(url: str) -> _Grouping:
    """Groups of cells, and the paths of each cell. Raises `UserError` for anything else."""
    import torch  # imported here because nothing else in the data package needs it

    expected = "expected a pair: groups of (east, north) cells, and the paths of each cell"
    try:
        with storage.open_input(url) as file:
            grouping = torch.load(file, weights_only=True)
    except Exception as error:  # torch's reader raises almost any exception on foreign bytes
        raise UserError(f"{url}: can't be read: {storage.reason(error)}; {expected}") from error
    if not _is_grouping(grouping):
        raise UserError(f"{url}: not the published grouping; {expected}")
    groups, paths_of_cell = grouping
    unknown = [cell for cells in groups for cell in cells if cell not in paths_of_cell]
    if unknown:
        raise UserError(f"{url}: no paths of the cell {unknown[0]}; {expected}")
    if not any(groups):
        raise UserError(f"{url}: no cells; {expected}")
    return grouping


def _is_grouping(value: Any) -> TypeGuard[_Grouping]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    groups, paths_of_cell = value
    return (
        isinstance(groups, list)
        and all(isinstance(cells, list) and all(isinstance(cell, tuple) for cell in cells) for cells in groups)
        and isinstance(paths_of_cell, dict)
        and all(isinstance(paths, list) and paths and isinstance(paths[0], str) for paths in paths_of_cell.values())
    )


def _table(
    paths: pa.LargeStringArray,
    utm_m: NDArray[np.float64],
    yaw_deg: NDArray[np.float64],
    num_panoramas: NDArray[np.int64],
) -> pa.Table:
    """One row per panorama, place by place; `num_panoramas` of each place."""
    place = pa.array(np.repeat(np.arange(len(num_panoramas)), num_panoramas))
    columns = {"place": place, "path": paths, "utm_east_m": utm_m[:, 0], "utm_north_m": utm_m[:, 1], "yaw_deg": yaw_deg}
    return pa.table(columns)


def _cached(url: str, root: str, places: Callable[[], pa.Table]) -> SfXl:
    """The grouping in a file; if that is missing or (with a warning) damaged, it is made from `places`."""
    try:
        found = _read_cache(url, root)
    except sealed.DamagedFileError as error:
        sealed.warn(error)
        found = None
    if found is None:
        _write_cache(url, places())
        found = _read_cache(url, root)
    assert found is not None, f"{url} was written just now"
    return found


def _write_cache(url: str, places: pa.Table) -> None:
    sealed.write_parquet(url, places.cast(CACHE_SCHEMA), compression="zstd")


def _read_cache(url: str, root: str) -> SfXl | None:
    remedy = "it is made anew"
    table = sealed.read_parquet(url, CACHE_SCHEMA, remedy)
    if table is None:
        return None
    place, paths = table.column("place").to_numpy(), table.column("path").combine_chunks()
    if not len(place) or place[0] != 0 or not np.isin(np.diff(place), (0, 1)).all():
        raise sealed.DamagedFileError(url, "its places are not in order", remedy)
    if pc.any(pc.match_substring_regex(paths, storage.OUTSIDE)).as_py():
        raise sealed.DamagedFileError(url, "a path points outside the panorama folder", remedy)
    return SfXl(
        root=root,
        paths=paths,
        utm_m=np.stack([table.column(name).to_numpy() for name in ("utm_east_m", "utm_north_m")], axis=1),
        yaw_deg=table.column("yaw_deg").to_numpy(),
        offsets=offsets_of(np.bincount(place)),
    )


def _key_of_paths(paths: pa.LargeStringArray) -> str:
    digest = hashlib.sha256()
    for first in range(0, len(paths), _NUM_HASHED_AT_ONCE):
        digest.update("\n".join([*paths[first : first + _NUM_HASHED_AT_ONCE].to_pylist(), ""]).encode())
    return _key(digest.digest())


def _key(inputs: bytes) -> str:
    """Part of a cache file's name: a digest of the grouping's inputs."""
    constants = f"{_CACHE_VERSION} {panoramas.CELL_SIZE_M} {MIN_PANORAMAS}"
    return hashlib.sha256(constants.encode() + inputs).hexdigest()[:16]
