"""A file of weights is known by its checksum before it is loaded; a remote one is fetched once."""

from __future__ import annotations

import hashlib
import io
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch

from pairvpr.data import storage
from pairvpr.errors import UserError
from pairvpr.models import weights_file
from pairvpr.models.weights_file import WeightsFile, find_weights_file, read_state_dict


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    weights_file._cache_folder.cache_clear()
    yield tmp_path / "cache" / "pairvpr" / "weights"
    weights_file._cache_folder.cache_clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that were read from the store in memory, in order."""
    paths: list[str] = []
    filesystem = type(fsspec.filesystem("memory"))
    original = filesystem.open

    def open_and_note(self: object, path: str, mode: str = "rb", **options: object) -> object:
        if mode == "rb":
            paths.append(path)
        return original(self, path, mode, **options)

    monkeypatch.setattr(filesystem, "open", open_and_note)
    return paths


def content(value: float) -> bytes:
    sink = io.BytesIO()
    torch.save({"a": torch.full((3,), value)}, sink)
    return sink.getvalue()


def remote(data: bytes) -> str:
    url = f"memory://{uuid4().hex}/w.pth"
    storage.write_bytes(url, data)
    return url


def value_of(file: WeightsFile) -> float:
    return float(read_state_dict(file)["a"][0])


def test_a_remote_file_is_fetched_once(cache: Path, opened: list[str]) -> None:
    url = remote(content(1))
    first, second = find_weights_file(url), find_weights_file(url)
    assert first == second == WeightsFile(url, cache / first.sha256, hashlib.sha256(content(1)).hexdigest())
    assert value_of(second) == 1
    assert len(opened) == 1


def test_another_version_in_the_store_is_fetched(cache: Path) -> None:
    url = remote(content(1))
    first = find_weights_file(url)
    storage.remove_file(url)
    storage.write_bytes(url, content(2))
    assert value_of(find_weights_file(url)) == 2
    assert value_of(first) == 1  # a run that began with it keeps it


def test_a_damaged_copy_is_fetched_again(cache: Path, opened: list[str]) -> None:
    url = remote(content(1))
    file = find_weights_file(url)
    damaged = bytearray(content(1))
    damaged[-1] ^= 1
    file.path.write_bytes(damaged)
    assert value_of(find_weights_file(url)) == 1
    assert len(opened) == 2


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"sha256": "../../x", "version": ""}', b'{"sha256": 3}'])
def test_a_damaged_record_costs_a_download(cache: Path, opened: list[str], damage: bytes) -> None:
    url = remote(content(1))
    find_weights_file(url)
    (record,) = cache.glob("*.json")
    record.write_bytes(damage)
    assert value_of(find_weights_file(url)) == 1
    assert len(opened) == 2


def test_a_store_that_does_not_answer_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = remote(content(1))
    find_weights_file(url)
    monkeypatch.setattr(storage, "FIRST_WAIT_S", 0.0)

    def unreachable(self: object, path: str, **options: object) -> object:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "info", unreachable)
    assert value_of(find_weights_file(url)) == 1
    said = capsys.readouterr().err
    assert "no route to host" in said
    assert "copy from an earlier run" in said
    with pytest.raises(UserError, match=r"can't be read: .*no route to host"):
        find_weights_file("memory://other/w.pth")


def test_the_cache_is_private_and_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(mode=0o777, parents=True)
    cache.chmod(0o777)
    monkeypatch.setattr(weights_file, "CACHE_BYTES", 2 * len(content(0)))
    files = [find_weights_file(remote(content(value))) for value in range(3)]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert [file.path.exists() for file in files] == [False, True, True]


def test_what_another_process_deletes_before_it_is_read_is_fetched_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_file, "CACHE_BYTES", 1)
    first, second = (find_weights_file(remote(content(value))) for value in (1, 2))
    assert (first.path.exists(), second.path.exists()) == (False, True)
    assert (value_of(first), value_of(second)) == (1, 2)


def test_processes_that_make_room_at_once_disturb_nobody(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights_file, "CACHE_BYTES", 1)
    urls, errors = [remote(content(value)) for value in range(4)], list[Exception]()

    def find_again_and_again(url: str) -> None:
        try:
            for _ in range(30):
                find_weights_file(url)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=find_again_and_again, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_without_a_home_the_file_is_fetched_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    weights_file._cache_folder.cache_clear()
    assert value_of(find_weights_file(remote(content(1)))) == 1
    weights_file._cache_folder.cache_clear()


def test_a_file_that_changes_after_it_was_found_is_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content(1))
    file = find_weights_file(str(path))
    path.write_bytes(content(2))
    with pytest.raises(UserError, match="changed while the run started"):
        read_state_dict(file)


def hub_file(cache: Path, data: bytes) -> None:
    """What Hugging Face's client leaves in its cache after a download of OWNER/NAME."""
    root = cache / "models--OWNER--NAME"
    for folder in ("refs", "blobs", "snapshots/abc"):
        (root / folder).mkdir(parents=True)
    (root / "refs" / "main").write_text("abc")
    (root / "blobs" / "blob").write_bytes(data)
    (root / "snapshots" / "abc" / "w.pth").symlink_to("../../blobs/blob")


def test_the_hubs_own_cache_is_used_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub_file(tmp_path, content(3))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = find_weights_file("hf://OWNER/NAME/w.pth")
    assert value_of(file) == 3
    assert tmp_path in file.path.parents
    for url in ("hf://OWNER/NAME/other.pth", "hf://OWNER/NAME@v2/w.pth"):
        with pytest.raises(UserError, match="can't be reached, and the file is not in its cache"):
            find_weights_file(url)
    for url in ("hf://w.pth", "hf://OWNER/w.pth", "hf://"):
        with pytest.raises(UserError, match=r"model\.weights=hf://"):
            find_weights_file(url)
