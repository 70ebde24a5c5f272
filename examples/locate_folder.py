"""Locate all photos of a folder, into a CSV file: `python examples/locate_folder.py INDEX FOLDER OUT.csv [WEIGHTS]`"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from pairvpr import Localizer, PhotoError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def main(index: str, folder: str, output: str, weights: str | None = None) -> None:
    """A line for each photo: its best match, or why it can't be read."""
    localizer = Localizer.open(index, weights=weights)
    photos = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
    # Together they share forward passes and the features of candidates that several of them have.
    answers = localizer.locate(photos, k=1)
    with Path(output).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["photo", "match", "pair_score", "error"])
        for photo, answer in zip(photos, answers, strict=True):
            if isinstance(answer, PhotoError):
                table.writerow([photo, "", "", answer.reason])
            elif answer:
                table.writerow([photo, answer[0].path, answer[0].pair_score, ""])
            else:
                table.writerow([photo, "", "", "no match"])


if __name__ == "__main__":
    main(*sys.argv[1:])
