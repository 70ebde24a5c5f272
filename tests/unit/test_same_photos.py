"""A database that holds the queries themselves is said in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pairvpr.config.benchmark_schema import FoldersConfig
from pairvpr.data.benchmarks import load_benchmark
from pairvpr.data.manifest import Manifest
from pairvpr.data.same_photos import same_photos


@pytest.fixture
def root(tmp_path: Path) -> Path:
    contents = {"d/a.jpg": b"one", "d/b.jpg": b"two", "d/empty.jpg": b"", "q/x.jpg": b"new", "q/empty.jpg": b""}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def load(root: Path) -> None:
    load_benchmark(FoldersConfig(name="mine", database=f"{root}/d", queries=f"{root}/q"), "unused")


def test_copies_links_and_other_names_are_found(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load(root)
    assert capfd.readouterr().err == ""
    (root / "q/copy.jpg").write_bytes(b"two")
    os.link(root / "d/a.jpg", root / "q/link.jpg")
    (root / "q/soft.jpg").symlink_to(root / "d/b.jpg")
    load(root)
    assert capfd.readouterr().err == (
        f"mine: 3 of 5 queries are database photos, too, and each finds itself; the first: {root}/q/copy.jpg holds the "
        f"bytes of {root}/d/b.jpg\n"
    )


def test_photos_that_are_gone_or_in_a_store_are_nobodys_copies(root: Path) -> None:
    gone = Manifest.of(str(root / "q"), ["gone.jpg"])
    assert same_photos(gone, Manifest.of(str(root / "d"), ["a.jpg", "gone.jpg"])) == []
    assert same_photos(Manifest.of("memory://nowhere", ["a.jpg"]), Manifest.of(str(root / "d"), ["a.jpg"])) == []
