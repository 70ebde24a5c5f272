"""Files and URLs behind one set of verbs: atomic, sorted, and patient with a busy store."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from pairvpr.data import storage
from pairvpr.errors import UserError
from tests.support.flaky import FlakyFileSystem

REPOSITORY = Path(__file__).parents[2]
WRITE_IN_ANOTHER_PROCESS = """
import sys
from pairvpr.data import storage
for _ in range(40):
    storage.write_bytes(sys.argv[1], bytes([int(sys.argv[2])]) * 100_000)
"""


@pytest.fixture(params=["local", "file", "memory", "flaky"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A directory that nothing is in, on each side of the house."""
    kind = request.param
    if kind in {"local", "file"}:
        yield str(tmp_path / "place") if kind == "local" else f"file://{tmp_path}/place"
        return
    name = uuid4().hex
    yield f"{kind}://{name}/place"
    filesystem = fsspec.filesystem(kind)
    if filesystem.exists(f"/{name}"):
        filesystem.rm(f"/{name}", recursive=True)
    FlakyFileSystem.reset()


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    """A store that a test can make fail, and retries that do not wait."""
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)
    FlakyFileSystem.reset()
    yield FlakyFileSystem
    FlakyFileSystem.reset()


def test_write_read_size_digest_and_replace(place: str) -> None:
    url = storage.join(place, "a", "b.bin")
    assert not storage.exists(url)
    for data in (b"first", b"", b"\x00\xff" * 3_000_000, b"last"):
        storage.write_bytes(url, data)
        assert storage.exists(url)
        assert storage.exists(storage.join(place, "a"))
        assert storage.read_bytes(url) == data
        assert storage.size_bytes(url) == len(data)
        assert storage.sha256(url) == hashlib.sha256(data).hexdigest()
    assert storage.list_files(place) == ["a/b.bin"]


def test_json_round_trip(place: str) -> None:
    url = storage.join(place, "value.json")
    value = {"name": "Zürich 東京", "list": [1, None, 2.5], "nested": {"x": True}}
    storage.write_json(url, value)
    assert storage.read_json(url) == value
    assert storage.read_bytes(url).decode().splitlines()[1] == '  "name": "Zürich 東京",'


def test_the_head_of_a_file_is_its_first_bytes_or_all(place: str) -> None:
    url = storage.join(place, "file")
    storage.write_bytes(url, b"0123456789")
    heads = [storage.read_head(url, num_bytes) for num_bytes in (1, 4, 10, 11)]
    assert heads == [b"0", b"0123", b"0123456789", b"0123456789"]
    with pytest.raises(FileNotFoundError):
        storage.read_head(storage.join(place, "nothing"), 1)


def test_open_input_seeks(place: str) -> None:
    url = storage.join(place, "data.bin")
    storage.write_bytes(url, bytes(range(256)) * 100)
    with storage.open_input(url) as file:
        file.seek(25_000)
        assert file.read(3) == bytes([168, 169, 170])
        file.seek(-2, 2)
        assert file.read() == bytes([254, 255])


def test_files_are_listed_relative_and_sorted_by_code_point(place: str) -> None:
    names = ["b/z.txt", "a.txt", "B.txt", "b.txt", "b/a/deep.txt", "é.txt", "10", "9", "b-"]
    assert storage.list_files(place) == []
    for name in names:
        storage.write_bytes(storage.join(place, name), b"x")
    storage.write_bytes(f"{place}-beside/other.txt", b"x")
    assert storage.list_files(place) == sorted(names)
    assert storage.list_files(f"{place}/") == sorted(names)
    assert storage.list_files(storage.join(place, "b")) == ["a/deep.txt", "z.txt"]
    storage.remove_tree(f"{place}-beside")


def test_removing_what_is_there_and_what_is_not(place: str) -> None:
    for name in ("a.txt", "sub/b.txt", "sub/c/d.txt"):
        storage.write_bytes(storage.join(place, name), b"x")
    storage.remove_file(storage.join(place, "a.txt"))
    storage.remove_file(storage.join(place, "a.txt"))
    assert storage.list_files(place) == ["sub/b.txt", "sub/c/d.txt"]
    storage.remove_tree(storage.join(place, "sub"))
    storage.remove_tree(storage.join(place, "sub"))
    assert storage.list_files(place) == []


@pytest.mark.parametrize("read", [storage.read_bytes, storage.read_json, storage.open_input, storage.size_bytes])
def test_a_missing_file_is_file_not_found(place: str, read: Callable[[str], object]) -> None:
    with pytest.raises(FileNotFoundError):
        read(storage.join(place, "missing"))


def test_a_large_file_is_published_when_its_block_ends(place: str) -> None:
    url = storage.join(place, "large.bin")
    with storage.written_locally(url) as path:
        path.write_bytes(b"new")
        assert not storage.exists(url)
    assert storage.read_bytes(url) == b"new"
    assert storage.list_files(place) == ["large.bin"]


def _fail_while_writing(url: str) -> Path:
    with storage.written_locally(url) as path:
        path.write_bytes(b"half")
        raise RuntimeError(str(path))


def test_an_error_while_writing_keeps_the_old_file_and_nothing_else(place: str) -> None:
    url = storage.join(place, "large.bin")
    storage.write_bytes(url, b"old")
    with pytest.raises(RuntimeError) as caught:
        _fail_while_writing(url)
    assert storage.read_bytes(url) == b"old"
    assert storage.list_files(place) == ["large.bin"]
    assert not Path(str(caught.value)).exists()


def test_an_error_before_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), storage.written_locally(str(tmp_path / "never")):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_readers_see_a_whole_value_while_many_write(tmp_path: Path) -> None:
    url = str(tmp_path / "shared.bin")
    values = [bytes([number]) * 200_000 for number in range(6)]
    storage.write_bytes(url, values[0])
    done = threading.Event()

    def read_until_done() -> set[bytes]:
        seen = set()
        while not done.is_set():
            seen.add(storage.read_bytes(url))
        return seen

    with ThreadPoolExecutor(7) as threads:
        reader = threads.submit(read_until_done)
        writers = [threads.submit(lambda v=value: [storage.write_bytes(url, v) for _ in range(20)]) for value in values]
        for writer in writers:
            writer.result()
        done.set()
        assert reader.result() <= set(values)
    assert storage.list_files(str(tmp_path)) == ["shared.bin"]


def test_processes_that_write_one_name_leave_one_whole_file(tmp_path: Path) -> None:
    url = str(tmp_path / "shared.bin")
    command = [sys.executable, "-c", WRITE_IN_ANOTHER_PROCESS, url]
    processes = [subprocess.Popen([*command, str(number)], cwd=REPOSITORY) for number in (1, 2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert storage.read_bytes(url) in {b"\x01" * 100_000, b"\x02" * 100_000}
    assert storage.list_files(str(tmp_path)) == ["shared.bin"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("/a", "b", "c"), "/a/b/c"),
        (("/a/", "b"), "/a/b"),
        (("/", "b"), "/b"),
        (("s3://bucket/x/", "y"), "s3://bucket/x/y"),
        (("rel", "b"), "rel/b"),
    ],
)
def test_join(parts: tuple[str, ...], expected: str) -> None:
    assert storage.join(*parts) == expected


def test_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert storage.absolute("out") == f"{tmp_path}/out"
    assert storage.absolute("/out/") == "/out"
    assert storage.absolute("~/out") == "/home/someone/out"
    assert storage.absolute(f"file://{tmp_path}/x") == f"{tmp_path}/x"
    assert storage.absolute("s3://bucket/out/") == "s3://bucket/out"


def test_an_unknown_protocol_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match="can't open nosuch://bucket/x: Protocol not known: nosuch"):
        storage.read_bytes("nosuch://bucket/x")


URL = "flaky://bucket/folder/file"


def _written_locally(url: str) -> None:
    with storage.written_locally(url) as path:
        path.write_bytes(b"value")


def _opened(url: str) -> bytes:
    with storage.open_input(url) as file:
        return file.read()


VERBS: list[tuple[str, Callable[[], object], object]] = [
    ("cat_file", lambda: storage.read_bytes(URL), b"value"),
    ("pipe_file", lambda: storage.write_bytes(URL, b"value"), None),
    ("put_file", lambda: _written_locally(URL), None),
    ("open", lambda: _opened(URL), b"value"),
    ("open", lambda: storage.sha256(URL), hashlib.sha256(b"value").hexdigest()),
    ("info", lambda: storage.size_bytes(URL), 5),
    ("info", lambda: storage.exists(URL), True),
    ("find", lambda: storage.list_files("flaky://bucket/folder"), ["file"]),
    ("rm_file", lambda: storage.remove_file(URL), None),
    ("find", lambda: storage.remove_tree("flaky://bucket/folder"), None),
    ("rm", lambda: storage.remove_tree("flaky://bucket/folder"), None),
]
VERB_NAMES = [
    *("read_bytes", "write_bytes", "written_locally", "open_input", "sha256", "size_bytes", "exists", "list_files"),
    *("remove_file", "remove_tree-find", "remove_tree-rm"),
]


@pytest.mark.parametrize(("kind", "verb", "answer"), VERBS, ids=VERB_NAMES)
def test_every_verb_outlasts_a_store_that_refuses_four_times(
    flaky: type[FlakyFileSystem], kind: str, verb: Callable[[], object], answer: object
) -> None:
    storage.write_bytes(URL, b"value")
    flaky.failures_left[kind] = storage.NUM_TRIES - 1
    assert verb() == answer
    assert flaky.failures_left[kind] == 0
    removed = answer is None and kind not in {"pipe_file", "put_file"}
    assert storage.list_files("flaky://bucket") == ([] if removed else ["folder/file"])


@pytest.mark.parametrize(("kind", "verb", "answer"), VERBS, ids=VERB_NAMES)
def test_every_verb_gives_up_in_the_end(
    flaky: type[FlakyFileSystem], kind: str, verb: Callable[[], object], answer: object
) -> None:
    storage.write_bytes(URL, b"value")
    flaky.requests.clear()
    flaky.failures_left[kind] = 1000
    with pytest.raises(OSError, match="503 slow down"):
        verb()
    assert flaky.requests[kind] == storage.NUM_TRIES


@pytest.mark.parametrize("remove", [lambda: storage.remove_file(URL), lambda: storage.remove_tree("flaky://bucket")])
def test_a_busy_store_is_not_an_empty_one(flaky: type[FlakyFileSystem], remove: Callable[[], None]) -> None:
    storage.write_bytes(URL, b"value")
    flaky.failures_left["info"] = storage.NUM_TRIES - 1
    remove()
    assert storage.list_files("flaky://bucket") == []


@pytest.mark.parametrize("error", [FileNotFoundError("gone"), PermissionError("no"), IsADirectoryError("folder")])
def test_an_answer_is_not_asked_for_again(flaky: type[FlakyFileSystem], error: OSError) -> None:
    storage.write_bytes(URL, b"value")
    flaky.error = error
    flaky.failures_left["cat_file"] = 1000
    with pytest.raises(type(error)):
        storage.read_bytes(URL)
    assert flaky.requests["cat_file"] == 1


def test_what_is_no_fault_of_the_store_is_not_retried(flaky: type[FlakyFileSystem]) -> None:
    flaky.error = ValueError("a defect")
    flaky.failures_left["pipe_file"] = 1000
    with pytest.raises(ValueError, match="a defect"):
        storage.write_bytes(URL, b"value")
    assert flaky.requests["pipe_file"] == 1


def test_the_pauses_grow(flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch) -> None:
    pauses_s: list[float] = []
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.2)
    monkeypatch.setattr(storage.time, "sleep", pauses_s.append)
    storage.write_bytes(URL, b"value")
    flaky.failures_left["cat_file"] = storage.NUM_TRIES - 1
    assert storage.read_bytes(URL) == b"value"
    assert pauses_s == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8]
