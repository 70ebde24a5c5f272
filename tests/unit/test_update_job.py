"""What a user can get wrong with update_index, filters and kinds of index: one line each, nothing written."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pairvpr.config.compose import load
from pairvpr.config.schema import BuildIndexConfig, ChangedIndexConfig, QueryConfig, UpdateIndexConfig
from pairvpr.data import storage
from pairvpr.data.manifest import Manifest, folder_manifest
from pairvpr.errors import UserError
from pairvpr.index.choose import kinds_to_try
from pairvpr.index.generations import read_manifest
from ray_jobs import build_index as building
from ray_jobs import query as querying
from ray_jobs import update_index as updating
from tests.support.index import describe_rows, write_index
from tests.support.runs import SMALL_NETWORK

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting Ray fails the test."""
    for module in (building, querying, updating):
        monkeypatch.setattr(module, "ray_session", lambda _: pytest.fail("Ray was started"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An index (of another model's weights) of three photos in `photos`, whose names hold no positions."""
    for name in ("photos/a.png", "photos/b.png", "photos/sub/c.png", "queries/q.png", "elsewhere/x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (30, 30)).save(tmp_path / name)
    photos = folder_manifest(f"{tmp_path}/photos", "database")
    write_index(f"{tmp_path}/index", [], np.eye(3, 16, dtype=np.float32), images=photos)
    return tmp_path


def mistake(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def update(root: Path, *line: str) -> Callable[[], object]:
    words = [f"index.path={root}/index", *SMALL_NETWORK, *(word.replace("ROOT", str(root)) for word in line)]
    return lambda: updating.update_index(load(UpdateIndexConfig, words))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([], "nothing to do: expected one or more of add=..., remove=..., compact=true, index.kind=..."),
        (["add=ROOT/elsewhere"], "it is not in ROOT/photos, where the index's photos are"),
        (["add=ROOT/photos/none"], "add=ROOT/photos/none: no such folder"),
        (["add=ROOT/none.txt"], "add=ROOT/none.txt: no such file"),
        (["remove=ROOT/none.csv"], "remove=ROOT/none.csv: no such file"),
        (["remove=ROOT/unknown.txt"], "z.png is not in the index (1 more are not, either)"),
        (["remove=ROOT/photos/nothing"], "it contains no photo of the index"),
        (["add=ROOT/list.txt", "remove=ROOT/list.txt"], "add and remove both name a.png"),
        (["add=ROOT/words.txt"], "readme.md is not a photo; expected .jpg"),
        (["add=ROOT/empty.txt"], "it lists no path"),
        (["remove=ROOT/absolute.txt"], "absolute.txt: /photos/a.png is not a path inside ROOT/photos"),
        (["add=ROOT/outside.txt"], "outside.txt: ../a.png is not a path inside ROOT/photos"),
        (["add=ROOT/list.txt", "remove=ROOT/dotted.txt"], "add and remove both name a.png"),
        (["remove=ROOT/list.txt", "index.num_lists=8"], "index.num_lists=8: nothing in this update reads it"),
        (["add=ROOT/photos", "positions=exif"], "photos/a.png: its EXIF has no GPS position"),
        (["add=ROOT/photos", "positions=names"], "add: a.png has no coordinates in its name"),
        (["add=ROOT/photos", "positions=table"], "expected positions=table and positions_table=FILE together"),
        (["compact=true", "index.compact_share=1.5"], "index.compact_share=1.5: expected 0 to below 1"),
        (["add=ROOT/photos"], "was made with model small and weights abababababab"),
        (["compact=true", "index.path=ROOT/nothing"], "no finished index there"),
    ],
)
def test_updates(root: Path, line: list[str], expected: str) -> None:
    (root / "list.txt").write_text("a.png\n")
    (root / "unknown.txt").write_text("a.png\nz.png\ny.png\n")
    (root / "words.txt").write_text("a.png\nreadme.md\n")
    (root / "empty.txt").write_text("\n")
    (root / "absolute.txt").write_text("/photos/a.png\n")
    (root / "outside.txt").write_text("sub/../../a.png\n")
    (root / "dotted.txt").write_text("./sub/..//a.png\n")
    before = storage.list_files(str(root))
    assert expected.replace("ROOT", str(root)) in mistake(update(root, *line))
    assert storage.list_files(str(root)) == before


ACTS_WITH = {
    "index.num_shards=4": {"add"},
    "index.compact_share=0.1": {"compact"},
    "index.num_build_threads=1": {"add", "compact", "index.kind"},
    "index.num_lists=8": {"index.kind"},
    "index.memory_budget_gib=1.5": {"index.kind"},
    "index.target_recall=0.99": {"index.kind"},
    "index.allow_overcommit=true": {"index.kind"},
}
ACTIONS = {"add": "add=x", "remove": "remove=x", "compact": "compact=true", "index.kind": "index.kind=ivf_8bit"}


@pytest.mark.parametrize("setting", ACTS_WITH)
@pytest.mark.parametrize("number", range(1, 16))
def test_a_setting_that_changes_nothing_is_refused(setting: str, number: int) -> None:
    """In every combination of what an update can do."""
    done = [name for place, name in enumerate(ACTIONS) if number >> place & 1]
    words = ["index.path=/index", *SMALL_NETWORK, *(ACTIONS[name] for name in done), setting]
    if ACTS_WITH[setting] & set(done):
        load(UpdateIndexConfig, words)
        return
    message = mistake(lambda: load(UpdateIndexConfig, words))
    assert f"{setting.partition('=')[0]}=" in message
    assert "nothing in this update reads it; expected" in message


def test_every_setting_of_the_index_is_tried() -> None:
    tried = {words.split("=")[0].removeprefix("index.") for words in ACTS_WITH}
    assert tried == {item.name for item in fields(ChangedIndexConfig)} - {"path", "kind"}


def test_a_photo_stays_where_what_replaces_it_can_not_be_read(tmp_path: Path) -> None:
    images = Manifest.of("/photos", [f"{number}.jpg" for number in range(6)])
    added = Manifest.of("/photos", ["1.jpg", "4.jpg", "7.jpg"])
    describe_rows(str(tmp_path), added, np.eye(3, dtype=np.float32), [], {1: "broken", 2: "broken"}, first_id=6)
    assert updating._less_unreadable(np.array([1, 3, 4]), images, added, str(tmp_path)).tolist() == [1, 3]


def test_another_line_keeps_its_files_elsewhere(root: Path) -> None:
    """A change that was killed is taken up by the same line only; another cut, other positions are another change."""
    manifest = read_manifest(f"{root}/index")
    assert manifest is not None
    gone = np.empty(0, np.int64)

    def prefix(versions: str, *line: str) -> str:
        config = load(UpdateIndexConfig, [f"index.path={root}/index", "add=x", *line])
        return updating._prefix(manifest, {"database": 1}, gone, pa.array([versions]), config)

    assert prefix("1") == prefix("1")
    others = [prefix("1", "index.num_shards=2"), prefix("1", "index.num_build_threads=1"), prefix("2"), prefix("1")]
    assert len(set(others)) == 4


def test_a_store_that_can_not_tell_writers_apart(root: Path) -> None:
    photos = folder_manifest(f"{root}/photos", "database")
    write_index("memory://shared/index", [], np.eye(3, 16, dtype=np.float32), images=photos)
    line = ["index.path=memory://shared/index", "compact=true"]
    assert "expected single_writer=true to confirm" in mistake(update(root, *line))
    assert "was made with model small" in mistake(update(root, *line, "single_writer=true"))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["filter.near_m=-1"], "filter.near_m=-1.0: expected a number above 0"),
        (["filter.center=[1,2]"], "filter.center is set: expected also filter.near_m"),
        (["filter.near_m=5", "filter.center=[1]"], "filter.center=[1.0]: expected [east, north] in metres"),
        (["filter.box=[3,0,1,1]"], "expected west <= east and south <= north"),
        (["filter.heading_deg=5"], "filter.heading_deg is set: expected also filter.within_deg"),
        (["filter.box=[0,0,1,1]", "filter.priors=x.csv"], "every condition already has a value for all queries"),
        (["filter.box=[0,0,1,1]"], "the index has no position of its photos"),
        (["filter.within_deg=5", "filter.heading_deg=5"], "the index has no heading of its photos"),
    ],
)
def test_filters(root: Path, line: list[str], expected: str) -> None:
    words = [f"index.path={root}/index", f"queries={root}/queries", f"output={root}/out", *SMALL_NETWORK, *line]
    assert expected in mistake(lambda: querying.query(load(QueryConfig, words)))
    assert not (root / "out").exists()


def test_queries_without_a_prior(root: Path) -> None:
    photos = folder_manifest(f"{root}/photos", "database").with_positions(np.zeros((3, 2)))
    write_index(f"{root}/placed", [], np.eye(3, 16, dtype=np.float32), images=photos)
    words = [f"index.path={root}/placed", f"queries={root}/queries", f"output={root}/out", *SMALL_NETWORK]
    message = mistake(lambda: querying.query(load(QueryConfig, [*words, "filter.near_m=5"])))
    assert "queries: q.png has no coordinates in its name" in message
    (root / "priors.csv").write_text("path,utm_east,utm_north\nz.png,1,2\n")
    message = mistake(
        lambda: querying.query(load(QueryConfig, [*words, "filter.near_m=5", f"filter.priors={root}/priors.csv"]))
    )
    assert "priors.csv" in message


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["index.kind=hnsw"], "index.kind"),
        (["index.kind=flat", "index.num_lists=4"], "index.kind=flat has no lists; expected one of ivf_fp16"),
        (["index.target_recall=1.5"], "index.target_recall=1.5: expected above 0, at most 1"),
        (["index.memory_budget_gib=0"], "index.memory_budget_gib=0.0: expected a number above 0"),
        (["positions=names"], "database: a.png has no coordinates in its name"),
    ],
)
def test_kinds_and_positions(root: Path, line: list[str], expected: str) -> None:
    words = [f"database={root}/photos", f"output={root}/new", *SMALL_NETWORK, *line]
    assert expected in mistake(lambda: building.build_index(load(BuildIndexConfig, words)))
    assert not (root / "new").exists()


def test_what_can_not_fit_is_refused_with_the_numbers() -> None:
    words = ["database=x", "output=y", "index.memory_budget_gib=0.01"]
    config = load(BuildIndexConfig, [*words, "index.kind=flat"]).index
    message = mistake(lambda: kinds_to_try(100_000, 512, 0.01 * 2**30, config))
    for part in ("100,000 x 512", "0.19 GiB", "0.01 GiB (index.memory_budget_gib)", "ivf_rabitq", "allow_overcommit"):
        assert part in message
    config = load(BuildIndexConfig, words).index
    message = mistake(lambda: kinds_to_try(10_000_000, 512, 0.01 * 2**30, config))
    assert "no kind of index for 10,000,000 x 512 descriptors fits" in message
    insisted = load(BuildIndexConfig, [*words, "index.allow_overcommit=true"]).index
    assert kinds_to_try(10_000_000, 512, 0.01 * 2**30, insisted) == ["ivf_rabitq"]
    too_few = load(BuildIndexConfig, ["database=x", "output=y", "index.kind=ivf_8bit"]).index
    assert "10 photos are too few for 16 lists" in mistake(lambda: kinds_to_try(10, 512, 1e9, too_few))


def test_lists_of_an_update_follow_the_rule_of_tables(root: Path) -> None:
    """What a list names otherwise than the folder does stands for the one photo that it can be."""
    (root / "photos" / "zürich.PNG").write_bytes((root / "photos" / "a.png").read_bytes())
    photos = folder_manifest(f"{root}/photos", "database")
    (root / "list.txt").write_text(unicodedata.normalize("NFD", " ./sub\\c.PNG\nzürich.png\na.png\n"))
    config = load(UpdateIndexConfig, [f"index.path={root}/index", f"remove={root}/list.txt"])
    none = np.empty(0, np.int64)
    gone = updating._gone(config, photos, none, None)
    assert [photos.path(int(i)) for i in gone] == ["a.png", "sub/c.png", "zürich.PNG"]
    adding = load(UpdateIndexConfig, [f"index.path={root}/index", f"add={root}/list.txt"])
    added = updating._added(adding, photos)
    assert added is not None
    assert added.paths == ["a.png", "sub/c.png", "zürich.PNG"]
    (root / "photos" / "zürich.pnG").write_bytes(b"")
    assert "could be several photos" in mistake(lambda: updating._added(adding, photos))
    both = folder_manifest(f"{root}/photos", "database")
    assert "could be several photos" in mistake(lambda: updating._gone(config, both, none, None))


def test_a_photo_that_was_replaced_is_one_photo(root: Path) -> None:
    """An index lists a replaced photo twice, and only its last version is alive."""
    images = Manifest.of(f"{root}/photos", ["a.png", "b.png", "a.png"])
    (root / "list.txt").write_text("./a.PNG\n")
    config = load(UpdateIndexConfig, [f"index.path={root}/index", f"remove={root}/list.txt"])
    assert updating._gone(config, images, np.array([0]), None).tolist() == [2]
    assert updating._gone(config, images, np.array([0, 2]), None).tolist() == []
