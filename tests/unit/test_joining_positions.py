"""Photos that join an index with positions have positions, or the line that adds them says that they have none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairvpr.config.benchmark_schema import PositionSource
from pairvpr.config.schema import ChangedIndexConfig, PositionsConfig, UpdateIndexConfig
from pairvpr.data.located import located
from pairvpr.data.manifest import Manifest
from pairvpr.data.utm import UtmZone
from pairvpr.errors import UserError
from ray_jobs import update_index as updating

INDEX = ChangedIndexConfig(path="index")
NAMES = PositionsConfig(positions=PositionSource.names)
SOURCES = "expected positions=names, positions=exif, positions=table with positions_table=FILE, or without_positions"
JOINING = ["@500010@5300010@.jpg", "@500020@5300020@.jpg", "plain.jpg"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the photos that join."""
    folder = tmp_path_factory.mktemp("photos")
    for name in JOINING:
        (folder / name).touch()
    return folder


def joined(images: Manifest, *names: str, without_positions: bool = False) -> Manifest:
    """The photos that `add=LIST` adds, without `positions=`."""
    listed = Path(images.root).parent / f"{Path(images.root).name}.txt"
    listed.write_text("\n".join(names))
    config = UpdateIndexConfig(add=str(listed), without_positions=without_positions, index=INDEX)
    found = updating._added(config, images)
    assert found is not None
    assert found.paths == sorted(names)
    return found


coordinates = st.tuples(st.integers(400_000, 600_000), st.integers(5_300_000, 5_400_000))


@given(st.lists(coordinates, min_size=1, max_size=5, unique=True), st.sampled_from(["", "32@U@", "33@U@"]), st.data())
def test_names_are_the_source_of_an_index_whose_positions_are_theirs(
    root: Path, places: list[tuple[int, int]], zone: str, data: st.DataObject
) -> None:
    """Of all photos whose position is known; one photo elsewhere, or of another heading, is another source."""
    images = located(
        Manifest.of(str(root), sorted(f"@{east}@{north}@{zone}.jpg" for east, north in places)), NAMES, "d"
    )
    paths, utm_m, heading_deg = [*images.paths, "unknown.jpg"], images.utm_m, np.full(len(images) + 1, np.nan)
    utm_m = np.concatenate([utm_m, np.full((1, 2), np.nan)])
    known = Manifest.of(str(root), paths, utm_m, heading_deg)
    np.testing.assert_array_equal(joined(known, *JOINING[:2]).utm_m, [[500010, 5300010], [500020, 5300020]])
    row = data.draw(st.integers(0, len(images) - 1))
    moved, turned = utm_m.copy(), heading_deg.copy()
    moved[row] += 0.01
    turned[row] = 90.0
    for other in (Manifest.of(str(root), paths, moved), Manifest.of(str(root), paths, utm_m, turned)):
        with pytest.raises(UserError, match=SOURCES):
            joined(other, JOINING[0])


def test_names_that_say_nothing_and_positions_of_other_sources(root: Path) -> None:
    of_names = located(Manifest.of(str(root), [JOINING[0]]), NAMES, "database")
    zone = UtmZone(32, south=False)
    of_degrees = Manifest.of(str(root), ["plain.jpg"], np.array([[500000.0, 5300000.0]]), zone=zone)
    for images, names in ((of_names, JOINING), (of_degrees, JOINING[:2]), (of_degrees, JOINING[2:])):
        with pytest.raises(UserError, match=SOURCES) as error:
            joined(images, *names)
        assert "\n" not in str(error.value)
        assert not joined(images, *names, without_positions=True).has_positions


def test_an_index_without_positions_asks_for_none(root: Path) -> None:
    assert not joined(Manifest.of(str(root), ["@1@2@.jpg"]), *JOINING).has_positions


def test_names_of_zones_join_in_the_zone_of_the_index(root: Path) -> None:
    """As `positions=names` puts them there."""
    images = located(Manifest.of(str(root), ["@500000@5300000@32@U@.jpg", "@510000@5300000@32@U@.jpg"]), NAMES, "d")
    name = "@60000@5310000@33@U@.jpg"
    (root / name).touch()
    expected = located(Manifest.of(str(root), [name]), NAMES, "add", images)
    assert joined(images, name).table.equals(expected.table, check_metadata=True)


@pytest.mark.parametrize("more", [{}, {"add": "DIR", "positions": PositionSource.names}])
def test_without_positions_is_for_photos_that_come_without_them(more: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"without_positions=true, add=.*: expected it with add="):
        UpdateIndexConfig(remove="LIST.txt", without_positions=True, index=INDEX, **more)  # pyright: ignore[reportArgumentType]
