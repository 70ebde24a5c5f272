"""Names of photos stand for all of their live ids, and for nothing else, whatever became of the index meanwhile."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from pairvpr.config.compose import load
from pairvpr.config.schema import ChangedIndexConfig, QueryConfig, RerankConfig, UpdateIndexConfig
from pairvpr.data.manifest import Benchmark, Manifest
from pairvpr.errors import UserError
from pairvpr.index.generations import IndexManifest, commit, read_images
from pairvpr.index.make import LocalRunner
from pairvpr.index.update import with_added, without
from ray_jobs import query as querying
from ray_jobs import update_index as updating
from ray_jobs.run import given_candidates
from tests.support.index import describe_rows, write_index
from tests.support.runs import SMALL_NETWORK

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
        with pytest.raises(UserError, match=r"'a\.Jpg' could be several photos"):
            gone(listed, images, removed, ["a.Jpg"])


def test_a_spelling_stands_for_all_ids_of_its_photo(listed: Path) -> None:
    images = Manifest.of("/photos", ["b.jpg", "p.jpg", "p.jpg", "p.jpg"])
    assert gone(listed, images, {1}, ["./p.JPG "]) == [2, 3]


def added(
    directory: str, manifest: IndexManifest, paths: list[str], unread: list[str], gone: list[int]
) -> IndexManifest:
    """The next generation: photos came, of which some could not be read, and ids went."""
    draft, prefix = replace(manifest, generation=manifest.generation + 1), f"updates/{manifest.generation + 1:06d}/"
    images, rejected = Manifest.of("/photos", paths), {paths.index(path): "broken" for path in unread}
    rows = np.ones((len(paths), 16), np.float32)
    describe_rows(f"{directory}/{prefix.rstrip('/')}", images, rows, [], rejected, first_id=draft.num_images)
    draft = with_added(directory, draft, prefix, images, 1, 1, LocalRunner())
    if gone:
        draft = without(directory, draft, prefix, np.array(gone, np.int64))
    commit(directory, draft)
    return draft


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, IndexManifest]:
    """An index whose photos p and s have several ids: 0 to 4 at first, then 5 to 7, then 8 to 10."""
    directory = str(tmp_path_factory.mktemp("index"))
    first = write_index(
        directory,
        ["p.jpg", "q.jpg", "r.jpg", "s.jpg", "t.jpg"],
        np.eye(5, 16, dtype=np.float32),
        rejected={4: "broken"},
    )
    second = added(directory, first, ["p.jpg", "s.jpg", "t.jpg"], ["s.jpg", "t.jpg"], [0, 2])
    return directory, added(directory, second, ["p.jpg", "u.jpg", "v.jpg"], ["v.jpg"], [5])


def candidates(updated: tuple[str, IndexManifest], file: Path, names: list[str]) -> list[int]:
    """The ids that a query's candidates of these names have."""
    directory, manifest = updated
    images, queries = read_images(directory, manifest), Manifest.of("/queries", ["x.jpg"])
    benchmark = Benchmark(name="query", database=images, queries=queries, positives=None, protocol={})
    file.write_text("".join(f"x.jpg {name}\n" for name in names))
    given = given_candidates(RerankConfig(candidates=str(file)), benchmark, updated)
    assert given is not None
    return given.by_query[0].tolist()


def test_given_candidates_are_what_a_search_finds(updated: tuple[str, IndexManifest], tmp_path: Path) -> None:
    """The last id of a replaced photo, the earlier one where the last can't be read, the last where none can."""
    expected = {"p.jpg": 8, "q.jpg": 1, "s.jpg": 3, "t.jpg": 7, "u.jpg": 9, "v.jpg": 10}
    for names in (list(expected), list(reversed(expected))):
        assert candidates(updated, tmp_path / "pairs.txt", names) == [expected[name] for name in names]


def test_a_removed_photo_is_no_candidate(updated: tuple[str, IndexManifest], tmp_path: Path) -> None:
    expected = r"the database photo r\.jpg is not in the index of /photos \(nor are 1 more\); expected names of photos"
    with pytest.raises(UserError, match=expected):
        candidates(updated, tmp_path / "pairs.txt", ["p.jpg", "r.jpg", "unknown.jpg"])


def test_query_refuses_a_removed_candidate(tmp_path: Path) -> None:
    """Before anything is written."""
    for folder in ("photos", "queries"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (30, 30)).save(tmp_path / folder / "x.png")
    images, index = Manifest.of(f"{tmp_path}/photos", ["gone.png", "x.png"]), f"{tmp_path}/index"
    first = write_index(index, [], np.eye(2, 16, dtype=np.float32), images=images)
    commit(index, without(index, replace(first, generation=2), "updates/2/", np.array([0])))
    (tmp_path / "pairs.txt").write_text("x.png x.png\nx.png gone.png\n")
    words = [f"index.path={index}", f"queries={tmp_path}/queries", f"output={tmp_path}/out", *SMALL_NETWORK]
    with pytest.raises(UserError, match=r"photo gone\.png is not in the index of"):
        querying.query(load(QueryConfig, [*words, f"rerank.candidates={tmp_path}/pairs.txt"]))
    assert not (tmp_path / "out").exists()
