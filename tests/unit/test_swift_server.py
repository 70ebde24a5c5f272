"""The S3 server that other tests rely on works as S3 does, and leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import s3fs
from pyarrow import fs as arrow_fs

from tests.support.swift_server import SwiftServer, running_swift

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
PART_BYTES = 5 * 2**20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SwiftServer]:
    with running_swift(tmp_path_factory.mktemp("swift") / "root") as running:
        yield running


@pytest.fixture
def s3(server: SwiftServer, monkeypatch: pytest.MonkeyPatch) -> s3fs.S3FileSystem:
    """A file system that finds the server by the environment alone."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return s3fs.S3FileSystem(skip_instance_cache=True)


def test_objects_are_written_listed_read_overwritten_and_deleted(s3: s3fs.S3FileSystem) -> None:
    s3.mkdir("objects")
    s3.pipe_file("objects/a/one", b"0123456789")
    s3.pipe_file("objects/b/two", b"second")
    assert sorted(s3.find("objects")) == ["objects/a/one", "objects/b/two"]
    assert s3.cat_file("objects/a/one", start=3, end=6) == b"345"

    s3.pipe_file("objects/a/one", b"replaced")
    assert s3.cat_file("objects/a/one") == b"replaced"

    s3.rm("objects", recursive=True)
    assert not s3.exists("objects")


def test_multipart_upload_reads_back_equal(s3: s3fs.S3FileSystem, tmp_path: Path) -> None:
    source = tmp_path / "large"
    content = bytes(range(256)) * (3 * PART_BYTES // 256) + b"the last part is short"
    s3.mkdir("multipart")
    source.write_bytes(content)
    s3.put_file(str(source), "multipart/large", chunksize=PART_BYTES)

    assert s3.info("multipart/large")["ETag"].strip('"').endswith("-4")
    assert s3.cat_file("multipart/large") == content
    boundary = slice(PART_BYTES - 5, PART_BYTES + 5)
    assert s3.cat_file("multipart/large", start=boundary.start, end=boundary.stop) == content[boundary]


def test_arrow_finds_the_server_by_the_environment(s3: s3fs.S3FileSystem) -> None:
    s3.mkdir("arrow")
    arrow, path = arrow_fs.FileSystem.from_uri("s3://arrow/file")
    with arrow.open_output_stream(path) as stream:
        stream.write(b"x" * (PART_BYTES + 1))
    assert s3.info("arrow/file")["size"] == PART_BYTES + 1
    arrow.delete_file(path)
    assert not s3.exists("arrow/file")


def test_wrong_key_is_refused(server: SwiftServer) -> None:
    stranger = s3fs.S3FileSystem(
        endpoint_url=server.endpoint_url, key=server.access_key, secret="wrong", skip_instance_cache=True
    )
    with pytest.raises(PermissionError):
        stranger.ls("")


def test_stopping_ends_the_process_and_keeps_to_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with running_swift(root) as running:
        process = psutil.Process(running.pid)
        assert not process.children(recursive=True)
        opened = [Path(file.path) for file in process.open_files()]
    assert not psutil.pid_exists(running.pid)
    assert opened
    assert all(path.is_relative_to(root.resolve()) for path in opened)


def test_server_stops_on_an_error_in_the_block(tmp_path: Path) -> None:
    pids = []

    def fail_while_it_runs() -> None:
        with running_swift(tmp_path / "root") as running:
            pids.append(running.pid)
            raise KeyError("in the block")

    with pytest.raises(KeyError):
        fail_while_it_runs()
    assert len(pids) == 1
    assert not psutil.pid_exists(pids[0])


def test_server_dies_with_its_parent(tmp_path: Path) -> None:
    parent_code = textwrap.dedent(
        f"""
        import os, pathlib, signal
        from tests.support.swift_server import running_swift
        with running_swift(pathlib.Path({str(tmp_path / "root")!r})) as running:
            print(running.pid, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    parent = subprocess.run(
        [sys.executable, "-c", parent_code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=False
    )
    assert parent.returncode == -9
    server_pid = int(parent.stdout)
    if psutil.pid_exists(server_pid):
        psutil.Process(server_pid).wait(timeout=10)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not empty"), running_swift(tmp_path):
        pass
