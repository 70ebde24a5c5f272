"""Photos that change under a run are noticed without being read."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import numpy as np
import pytest

from pairvpr.data import stamps, storage
from pairvpr.data.manifest import Manifest
from pairvpr.errors import UserError

NAMES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]


@pytest.fixture(params=["local", "store"])
def photos(request: pytest.FixtureRequest, tmp_path: Path) -> Manifest:
    """Three photos; the last one is not there."""
    root = str(tmp_path / "photos") if request.param == "local" else f"memory://stamps-{uuid.uuid4().hex}"
    for name in NAMES[:3]:
        storage.write_bytes(storage.join(root, name), name.encode())
    return Manifest.of(root, NAMES)


def test_what_was_replaced_or_has_come_is_changed_and_what_is_gone_is_not(photos: Manifest, tmp_path: Path) -> None:
    directory = str(tmp_path / "described")
    assert stamps.read(directory) is None
    stamps.write(directory, stamps.stamps(photos))
    before = stamps.read(directory)
    assert before is not None
    assert before.null_count == 1
    assert stamps.changed(before, stamps.stamps(photos)).tolist() == []
    stamps.check_unchanged(photos, directory)
    storage.remove_file(photos.url(0))
    assert stamps.changed(before, stamps.stamps(photos)).tolist() == []
    storage.write_bytes(photos.url(1), b"another photo")
    storage.write_bytes(photos.url(3), b"repaired")
    assert stamps.changed(before, stamps.stamps(photos)).tolist() == [1, 3]
    with pytest.raises(
        UserError, match=r"2 of 4 photos have changed since they were described in .*, the first is b\.j"
    ):
        stamps.check_unchanged(photos, directory)


def test_a_listing_and_a_single_answer_agree(photos: Manifest) -> None:
    assert stamps.stamps(photos).to_pylist() == stamps.stamps_of(photos, np.arange(4)).to_pylist()


def test_other_bytes_of_the_same_size_are_noticed_by_their_time(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"one")
    photos = Manifest.of(str(tmp_path), ["a.jpg"])
    before = stamps.stamps(photos)
    (tmp_path / "a.jpg").write_bytes(b"two")
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert stamps.changed(before, stamps.stamps(photos)).tolist() == [0]
