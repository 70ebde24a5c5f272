"""Which files of a folder are photos, by the endings of their names; files that systems leave behind are none."""

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
    """The photos of a folder, in the order given, and how many files of each other ending there are."""

    photos: list[str]
    others: Counter[str]

    def left_out(self) -> str | None:
        """How many files of which kinds are no photos, as one line says it; None without any."""
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
    """Among `paths`, relative to a folder. What systems leave behind is neither a photo nor counted."""
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
