"""Names of photos stand for all of their live ids, and for nothing else, whatever became of the index meanwhile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pairvpr.config.schema import ChangedIndexConfig, UpdateIndexConfig
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError
from ray_jobs import update_index as updating

NAMES = ["a.jpg", "a.JPG", "a b.jpg", "a%20b.jpg", "sub/c.jpg"]
"""Of which some are spellings of others."""
INDEX = ChangedIndexConfig(path="index")

chosen = st.lists(st.sampled_from(NAMES), min_size=1, max_size=3, unique=True)
adds = st.dictionaries(st.sampled_from(NAMES), st.booleans(), min_size=1, max_size=3)  # whether each can be read


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list that may be written again and again."""
    return tmp_path_factory.mktemp("lists") / "LIST.txt"


def gone(listed: Path, images: Manifest, removed: set[int], names: list[str]) -> list[int]:
    """The ids that `remove=LIST` removes from an index of these photos."""
    listed.write_text("\n".join(names))
    config = UpdateIndexConfig(remove=str(listed), index=INDEX)
    return updating._gone(config, images, ascending(removed), None).tolist()


def ascending(ids: set[int]) -> NDArray[np.int64]:
    return np.array(sorted(ids), np.int64)


@given(steps=st.lists(adds | chosen, max_size=8), last=chosen)
def test_every_live_id_of_a_name_goes_and_no_other(
    listed: Path, steps: list[dict[str, bool] | list[str]], last: list[str]
) -> None:
    """After photos came, could not be read, came again and went; compared with the ids of each path, kept by hand."""
    paths, removed, unread = list(NAMES), set[int](), set[int]()
    for step in steps:
        images = Manifest.of("/photos", paths)
        if isinstance(step, list):
            removed |= set(gone(listed, images, removed, step))
            continue
        config = UpdateIndexConfig(add="x", index=INDEX)
        added = Manifest.of("/photos", sorted(step))
        its = updating._gone(config, images, ascending(removed), added).tolist()
        removed |= {image_id for image_id in its if step[paths[image_id]]}  # what can't be read replaces nothing
        unread |= {len(paths) + place for place, path in enumerate(added.paths) if not step[path]}
        paths += added.paths
        found = [path for image_id, path in enumerate(paths) if image_id not in removed | unread]
        assert len(found) == len(set(found))  # no photo takes part twice
    images = Manifest.of("/photos", paths)
    expected = [image_id for image_id, path in enumerate(paths) if path in last and image_id not in removed]
    assert gone(listed, images, removed, last) == expected
    assert gone(listed, images, removed | set(expected), last) == []  # the same line again


@pytest.mark.parametrize(
    ("name", "other"),
    [("a.JPG", "a.jpg"), ("a b.jpg", "a%20b.jpg"), ("a%20b.jpg", "a b.jpg"), ("zu\u0308rich.jpg", "z\u00fcrich.jpg")],
)
def test_a_name_whose_photo_is_removed_stands_for_no_other_one(listed: Path, name: str, other: str) -> None:
    images = Manifest.of("/photos", sorted([name, other]))
    its = images.paths.index(name)
    assert gone(listed, images, set(), [name]) == [its]
    assert gone(listed, images, {its}, [name]) == []


def test_a_spelling_of_a_removed_and_of_a_live_photo_is_refused(listed: Path) -> None:
    """Which of them is meant does not depend on what was removed earlier."""
    images = Manifest.of("/photos", ["a.JPG", "a.jpg"])
    for removed in (set[int](), {0}, {1}):
        with pytest.raises(UserError, match="'a.Jpg' could be several photos"):
            gone(listed, images, removed, ["a.Jpg"])


def test_a_spelling_stands_for_all_ids_of_its_photo(listed: Path) -> None:
    images = Manifest.of("/photos", ["b.jpg", "p.jpg", "p.jpg", "p.jpg"])
    assert gone(listed, images, {1}, ["./p.JPG "]) == [2, 3]
