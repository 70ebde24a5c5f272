"""Training sets by name, and the pixels of a view."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from pairvpr.data import images, panoramas, storage
from pairvpr.data.training_sets.base import TrainingSet, View
from pairvpr.data.training_sets.gsv_cities import read_gsv_cities
from pairvpr.data.training_sets.landmarks import read_landmarks
from pairvpr.data.training_sets.sfxl import read_sfxl
from pairvpr.errors import UserError

FOLDERS = {"sfxl": "sf_xl", "gsv_cities": "gsv_cities", "gldv2": "gldv2"}


def read_training_sets(
    names: Sequence[str], root: str, cache_directory: str, landmarks_csv: str | None = None
) -> list[TrainingSet]:
    """The named sets, each in its folder of `FOLDERS` below `root`; slow listings are kept in `cache_directory`.

    `landmarks_csv` is the list of Google Landmarks v2, if it is not next to its photos. Raises `UserError` for
    an unknown or repeated name, or no name, and as the readers of the sets do.
    """
    unknown = [name for name in names if name not in FOLDERS]
    if unknown or not names:
        what = f"unknown {', '.join(unknown)}" if unknown else "none given"
        raise UserError(f"train.datasets: {what}; expected some of {', '.join(FOLDERS)}")
    if len(set(names)) < len(names):
        raise UserError(f"train.datasets: {', '.join(names)} lists a dataset twice; expected each once")
    return [_read(name, storage.join(root, FOLDERS[name]), cache_directory, landmarks_csv) for name in names]


def load_view(view: View) -> Image.Image:
    """The pixels of a view: upright RGB in the photo's own size, or the crop of a panorama.

    Raises `BrokenImageError` if the photo can't be read, `StorageError` if its storage can't be reached.
    """
    photo = images.load_upright(view.url)
    return photo if view.left_px is None else panoramas.crop(photo, view.left_px)


def _read(name: str, folder: str, cache_directory: str, landmarks_csv: str | None) -> TrainingSet:
    if name == "sfxl":
        return read_sfxl(folder, cache_directory)
    return read_gsv_cities(folder) if name == "gsv_cities" else read_landmarks(folder, landmarks_csv)
