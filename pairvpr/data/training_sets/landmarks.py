"""Google Landmarks v2, the cleaned training split: photos of landmarks from all over the world.

Layout: `train_clean.csv` lists each landmark's photos; photo `abc...` is `train/a/b/c/abc....jpg`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
from numpy.random import Generator

from pairvpr.data import storage
from pairvpr.data.training_sets.base import View
from pairvpr.data.training_sets.places import digest, draw_photos
from pairvpr.data.training_sets.tables import read_csv
from pairvpr.errors import UserError

MIN_PHOTOS = 4
CSV_NAME = "train_clean.csv"
COLUMNS = {"landmark_id": pa.int64(), "images": pa.string()}
_IMAGE_IDS = re.compile(r"\s*[\w-]{3,}(\s+[\w-]{3,})*\s*")


def photo_path(image_id: str) -> str:
    """Path of a photo below the set's root."""
    return f"train/{image_id[0]}/{image_id[1]}/{image_id[2]}/{image_id}.jpg"


@dataclass(frozen=True, eq=False)
class Landmarks:
    """Landmarks in CSV order; `images` holds the photo ids of each, separated by spaces."""

    root: str
    images: pa.Array

    @property
    def name(self) -> str:
        """As in `train.datasets`."""
        return "gldv2"

    def __len__(self) -> int:
        """Number of landmarks."""
        return len(self.images)

    @property
    def places_sha256(self) -> str:
        """See `TrainingSet.places_sha256`."""
        return self._places_sha256

    @cached_property
    def _places_sha256(self) -> str:
        return digest(self.images)

    def draw(self, place: int, count: int, rng: Generator, broken: Collection[str] = ()) -> list[View]:
        """`count` different photos of a landmark, drawn uniformly, without those in `broken`."""
        image_ids: list[str] = self.images[place].as_py().split()

        def url_of(photo: int) -> str:
            return storage.join(self.root, photo_path(image_ids[photo]))

        return draw_photos(len(image_ids), url_of, count, rng, broken)


def read_landmarks(root: str, csv: str | None = None) -> Landmarks:
    """Landmarks with at least `MIN_PHOTOS` photos; `csv` is by default `train_clean.csv` next to `train/`.

    Raises `UserError`, naming the file, folder or column, if the layout differs or there is no landmark.
    """
    root = storage.absolute(root)
    url = storage.join(root, CSV_NAME) if csv is None else csv
    images = read_csv(url, COLUMNS).column("images")
    folder = storage.join(root, "train")
    if not storage.exists(folder):
        raise UserError(f"{folder}: no such folder; expected the photos that {url} lists")
    kept = [ids for ids in images.to_pylist() if len(set(ids.split())) >= MIN_PHOTOS]
    if not kept:
        raise UserError(f"{url}: no landmark with at least {MIN_PHOTOS} photos")
    for ids in kept:
        if not _IMAGE_IDS.fullmatch(ids):
            raise UserError(f"{url}: the column images holds {ids[:80]!r}; expected ids of photos, separated by spaces")
    return Landmarks(root, pa.array(kept, pa.string()))
