"""Files and URLs behind one set of verbs: atomic, sorted, and patient with a busy store."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import fsspec.config
import pytest
import s3fs
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

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


def test_a_name_is_created_once(place: str) -> None:
    url = storage.join(place, "a", "commit.json")
    assert storage.create_exclusively(url, b"first")
    assert not storage.create_exclusively(url, b"other")
    assert not storage.create_exclusively(url, b"")
    assert storage.create_exclusively(url, b"first")  # a try that never heard its answer
    assert storage.read_bytes(url) == b"first"
    assert storage.list_files(place) == ["a/commit.json"]
    storage.remove_file(url)
    assert storage.create_exclusively(url, b"other")
    assert storage.read_bytes(url) == b"other"


def test_of_many_that_create_one_name_exactly_one_does(tmp_path: Path) -> None:
    values = [bytes([number]) * 100_000 for number in range(16)]
    barrier = threading.Barrier(len(values))

    def create(url: str, value: bytes) -> bool:
        barrier.wait()
        return storage.create_exclusively(url, value)

    with ThreadPoolExecutor(len(values)) as threads:
        for attempt in range(20):
            url = str(tmp_path / str(attempt))
            created = list(threads.map(lambda value, url=url: create(url, value), values))
            assert created.count(True) == 1
            assert storage.read_bytes(url) == values[created.index(True)]
    assert len(storage.list_files(str(tmp_path))) == 20  # no temporary file is left


def test_readers_never_see_half_of_a_created_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "file")
    sizes: list[bool] = []
    fsync = storage.os.fsync
    monkeypatch.setattr(storage.os, "fsync", lambda file: (sizes.append(storage.exists(url)), fsync(file)))
    assert storage.create_exclusively(url, b"x" * 1000)
    assert sizes == [False]


def test_a_name_that_is_freed_meanwhile_is_created(flaky: type[FlakyFileSystem]) -> None:
    storage.write_bytes(URL, b"other")
    cat_file = FlakyFileSystem.cat_file

    def gone(self: FlakyFileSystem, path: str) -> bytes:
        self.rm_file(path)
        return cat_file(self, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlakyFileSystem, "cat_file", gone)
        assert storage.create_exclusively(URL, b"value")
    assert storage.read_bytes(URL) == b"value"


def test_a_store_that_contradicts_itself_is_not_asked_forever(flaky: type[FlakyFileSystem]) -> None:
    flaky.error = FileExistsError("taken")
    flaky.failures_left["pipe_file"] = 1000
    with pytest.raises(storage.StorageError, match="the store reports it both as present and as missing"):
        storage.create_exclusively(URL, b"value")
    assert flaky.requests["pipe_file"] == storage.NUM_TRIES


class S3LikeError(OSError):
    """What s3fs makes of an error of S3."""

    def __init__(self, code: str) -> None:
        super().__init__(22, "At least one of the pre-conditions you specified did not hold")
        self.__cause__ = RuntimeError(code)
        self.__cause__.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]


@pytest.mark.parametrize("code", ["PreconditionFailed", "412"])
def test_a_failed_condition_means_that_the_name_is_taken(flaky: type[FlakyFileSystem], code: str) -> None:
    storage.write_bytes(URL, b"value")
    flaky.requests.clear()
    flaky.error = S3LikeError(code)
    flaky.failures_left["pipe_file"] = 2
    assert storage.create_exclusively(URL, b"value")
    assert not storage.create_exclusively(URL, b"other")
    assert flaky.requests["pipe_file"] == 2


def test_an_upload_that_the_store_forgot_is_sent_again(flaky: type[FlakyFileSystem]) -> None:
    error = FileNotFoundError("The specified multipart upload does not exist.")
    error.__cause__ = S3LikeError("NoSuchUpload").__cause__
    flaky.error = error
    flaky.failures_left["put_file"] = 2
    _written_locally(URL)
    assert storage.read_bytes(URL) == b"value"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Settings of S3 as on a bare machine."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(fsspec.config, "conf", {})
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("relative", True),
        ("/path", True),
        ("file:///path", True),
        ("s3://bucket/x", True),
        ("s3a://bucket/x", True),
        ("memory://x", False),
        ("flaky://x", False),
    ],
)
def test_creation_is_atomic_on_disks_and_on_aws(aws: None, url: str, expected: bool) -> None:
    assert storage.has_atomic_creation(url) is expected


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("AWS_DEFAULT_REGION", "eu-central-1", True),
        ("AWS_DEFAULT_REGION", "cn-north-1", True),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:8080", False),
        ("AWS_ENDPOINT_URL_S3", "https://s3.example.org", False),
        ("AWS_ENDPOINT_URL", "https://amazonaws.com.example.org", False),
        ("AWS_ENDPOINT_URL", "https://s3.eu-west-1.amazonaws.com", True),
    ],
)
def test_creation_is_not_atomic_at_another_endpoint(
    aws: None, monkeypatch: pytest.MonkeyPatch, name: str, value: str, expected: bool
) -> None:
    monkeypatch.setenv(name, value)
    assert storage.has_atomic_creation("s3://bucket/x") is expected


@pytest.mark.parametrize("settings", [{"endpoint_url": "http://h"}, {"client_kwargs": {"endpoint_url": "http://h"}}])
def test_fsspecs_settings_are_heard_too(aws: None, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", settings)
    assert not storage.has_atomic_creation("s3://bucket/x")


def test_aws_profiles_are_heard_too(aws: None, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("[default]\nendpoint_url = https://s3.example.org\n")
    assert not storage.has_atomic_creation("s3://bucket/x")


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


UPLOADS = pytest.mark.parametrize("write", [lambda: storage.write_bytes(URL, b"value"), lambda: _written_locally(URL)])


def _damage_uploads(monkeypatch: pytest.MonkeyPatch, damages: list[Callable[[FlakyFileSystem, str], None]]) -> None:
    """What befalls the next uploads, one after the other."""

    def damaged(upload: Callable[..., None]) -> Callable[..., None]:
        def upload_and_damage(self: FlakyFileSystem, *args: Any, **kwargs: Any) -> None:
            upload(self, *args, **kwargs)
            if damages:
                damages.pop(0)(self, self._strip_protocol(URL))

        return upload_and_damage

    monkeypatch.setattr(FlakyFileSystem, "pipe_file", damaged(FlakyFileSystem.pipe_file))
    monkeypatch.setattr(FlakyFileSystem, "put_file", damaged(FlakyFileSystem.put_file))


def _hold(data: bytes) -> Callable[[FlakyFileSystem, str], None]:
    return lambda filesystem, path: MemoryFileSystem.pipe_file(filesystem, path, data)


def _tell_etags(monkeypatch: pytest.MonkeyPatch, etag: Callable[[bytes], str]) -> None:
    """Let the store say the ETag of what it holds."""
    info = FlakyFileSystem.info

    def with_etag(self: FlakyFileSystem, path: str, **kwargs: Any) -> dict[str, Any]:
        return {**info(self, path, **kwargs), "ETag": etag(self.store[self._strip_protocol(path)].getvalue())}

    monkeypatch.setattr(FlakyFileSystem, "info", with_etag)


def _quoted_md5(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'


@UPLOADS
def test_a_file_that_arrived_short_or_not_at_all_is_sent_again(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]
) -> None:
    damages = [_hold(b"val"), _hold(b""), _hold(b"value and more"), lambda filesystem, path: filesystem.rm_file(path)]
    _damage_uploads(monkeypatch, damages)
    write()
    assert damages == []
    assert storage.read_bytes(URL) == b"value"


@UPLOADS
def test_a_file_that_arrived_with_other_bytes_is_sent_again(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]
) -> None:
    damages = [_hold(b"vxlue"), _hold(b"VALUE")]
    _damage_uploads(monkeypatch, damages)
    _tell_etags(monkeypatch, _quoted_md5)
    write()
    assert damages == []
    assert storage.read_bytes(URL) == b"value"


@UPLOADS
def test_a_store_that_damages_every_file_is_told(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch, write: Callable[[], None]
) -> None:
    _damage_uploads(monkeypatch, [_hold(b"vxlue")] * storage.NUM_TRIES)
    _tell_etags(monkeypatch, _quoted_md5)
    with pytest.raises(
        storage.StorageError, match=f"^{URL}: OSError: the stored bytes differ from those that were sent$"
    ):
        write()


@UPLOADS
@pytest.mark.parametrize(
    ("etag", "num_reads"), [(_quoted_md5(b"encrypted"), 1), (f'{_quoted_md5(b"")[:-1]}-3"', 0), ("", 0), ("0x8DA", 0)]
)
def test_etags_that_are_no_md5_of_the_bytes_are_no_fault(
    flaky: type[FlakyFileSystem],
    monkeypatch: pytest.MonkeyPatch,
    write: Callable[[], None],
    etag: str,
    num_reads: int,
) -> None:
    _tell_etags(monkeypatch, lambda _: etag)
    opened: list[str] = []
    open_file = FlakyFileSystem.open

    def counted(self: FlakyFileSystem, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        opened.extend([path] if mode == "rb" else [])
        return open_file(self, path, mode, **kwargs)

    monkeypatch.setattr(FlakyFileSystem, "open", counted)
    write()
    assert len(opened) == num_reads
    assert flaky.requests["pipe_file"] + flaky.requests["put_file"] == 1
    assert storage.read_bytes(URL) == b"value"


class ClientPayloadError(Exception):
    """As aiohttp calls half an answer."""


class HTTPClientError(Exception):
    """As botocore calls a broken connection, of which there are several kinds."""


class ConnectionClosedError(HTTPClientError):
    """One of them."""


class NoCredentialsError(Exception):
    """As botocore says that asking again is in vain."""


@pytest.mark.parametrize("error", [ClientPayloadError("cut"), ConnectionClosedError("cut")])
def test_half_an_answer_is_asked_for_again(flaky: type[FlakyFileSystem], error: Exception) -> None:
    storage.write_bytes(URL, b"value")
    flaky.error = error
    flaky.failures_left["cat_file"] = 3
    assert storage.read_bytes(URL) == b"value"


def test_a_clients_other_errors_are_final(flaky: type[FlakyFileSystem]) -> None:
    storage.write_bytes(URL, b"value")
    flaky.error = NoCredentialsError("Unable to locate credentials")
    flaky.failures_left["cat_file"] = 1000
    with pytest.raises(storage.StorageError, match=f"^{URL}: NoCredentialsError: Unable to locate credentials$"):
        storage.read_bytes(URL)
    assert flaky.requests["cat_file"] == 1


def test_reads_of_an_open_file_outlast_a_busy_store(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 1000
    storage.write_bytes(URL, data)
    failures = iter([True, True, False] * 1000)
    read = MemoryFile.read

    def flaky_read(self: MemoryFile, size: int = -1) -> bytes:
        if next(failures):
            raise OSError("503 slow down")
        return read(self, size)

    monkeypatch.setattr(MemoryFile, "read", flaky_read, raising=False)
    with storage.open_input(URL) as file:
        assert file.read(1000) == data[:1000]
        assert file.tell() == 1000
        file.seek(-5000, 2)
        assert file.read() == data[-5000:]
        file.seek(3)
        assert file.read(200_000) == data[3:200_003]
    assert storage.sha256(URL) == hashlib.sha256(data).hexdigest()
