"""Which files of a folder take part, and what is said about the others."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from pairvpr.data import images
from pairvpr.data.manifest import folder_manifest
from pairvpr.data.photo_listing import IMAGE_SUFFIXES, photos_among
from pairvpr.errors import UserError

OF_SYSTEMS = [
    "._a.jpg", "sub/._a.jpg", ".hidden/a.jpg", "__MACOSX/a.jpg", "x/__MACOSX/y/a.jpg", "@eaDir/a.jpg/SYNO.jpg",
    ".ipynb_checkpoints/a-checkpoint.jpg", "#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "lost+found/a.jpg",
    "System Volume Information/a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".Trash-1000/files/a.jpg",
    "#snapshot/daily/a.jpg",
]  # fmt: skip


def test_system_files_take_no_part_and_are_not_counted() -> None:
    found = photos_among([*OF_SYSTEMS, "a.jpg", "@1@2@.jpg", "@1@2@folder/b.JPEG", "a.b/c.tif"])
    assert found.photos == ["a.jpg", "@1@2@.jpg", "@1@2@folder/b.JPEG", "a.b/c.tif"]
    assert found.left_out() is None


def test_files_of_other_kinds_are_counted_by_kind() -> None:
    found = photos_among(["a.HEIC", "b.heic", "c.xml", "README", "d.jpg", "e.\n"])
    assert found.photos == ["d.jpg"]
    assert found.left_out() == (
        "5 files of other kinds take no part (2 .heic, 1 .\\n, 1 .xml, 1 without an ending); "
        f"photos are {', '.join(IMAGE_SUFFIXES)}"
    )
    many = photos_among([f"a.x{number:02d}" for number in range(20)])
    assert "1 .x07, 12 others)" in (many.left_out() or "")


def test_a_folder_says_what_it_leaves_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("a.jpg", "b.heic", "._a.jpg"):
        (tmp_path / name).touch()
    assert folder_manifest(str(tmp_path), "database").paths == ["a.jpg"]
    assert capfd.readouterr().err.startswith(f"database={tmp_path}: 1 file of another kind takes no part (1 .heic)")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"no photo in it; 1 file of another kind takes no part \(1 \.heic\)"):
        folder_manifest(str(tmp_path), "database")


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_kind_that_takes_part_is_read(tmp_path: Path, suffix: str) -> None:
    Image.new("RGB", (32, 24), (200, 30, 30)).save(tmp_path / f"a{suffix}")
    red, green, _ = images.load(f"{tmp_path}/a{suffix}", 8).mean(axis=(0, 1))
    assert red > 180
    assert green < 50
