"""Which files of a folder are photos, by file extension; operating systems' own files are ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".avif")
_SYSTEM_NAMES = {
    *("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
_MOST_KINDS = 8


@dataclass(frozen=True)
class FoundFiles:
    """The photos of a folder, in the given order, and the number of other files by extension."""

    photos: list[str]
    others: Counter[str]

    def left_out(self) -> str | None:
        """One line on the number of other files, by kind; None if there are none."""
        if not self.others:
            return None
        kinds = sorted(self.others.items(), key=lambda item: (-item[1], item[0]))
        texts = [f"{count:,} {kind}" for kind, count in kinds[:_MOST_KINDS]]
        more = sum(count for _, count in kinds[_MOST_KINDS:])
        listed = ", ".join([*texts, f"{more:,} others"] if more else texts)
        num_files = self.others.total()
        what = "1 file of another kind takes" if num_files == 1 else f"{num_files:,} files of other kinds take"
        return f"{what} no part ({listed}); photos are {', '.join(IMAGE_SUFFIXES)}"


def photos_among(paths: Sequence[str]) -> FoundFiles:
    """Find the photos among `paths`, relative to a folder. Operating systems' own files are ignored."""
    photos, others = list[str](), Counter[str]()
    for path in paths:
        if _is_of_system(path):
            continue
        if path.lower().endswith(IMAGE_SUFFIXES):
            photos.append(path)
        else:
            suffix = PurePosixPath(path).suffix.lower()
            others[ascii(suffix)[1:-1] if suffix else "without an ending"] += 1
    return FoundFiles(photos, others)


def _is_of_system(path: str) -> bool:
    return any(part.startswith(".") or part.lower() in _SYSTEM_NAMES for part in path.split("/"))
