"""Index a small folder of photos, then look up every photo of another folder.

    python examples/locate_folder.py DATABASE QUERIES INDEX MODEL

No cluster is needed. For more than some thousand photos use `build_index` and `query`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pairvpr import Localizer, PhotoError


def main(database: str, queries: str, index: str, model: str) -> None:
    localizer = Localizer.build(database, index, model=model, positions="names")
    photos = sorted(Path(queries).glob("*.jpg"))
    for photo, answer in zip(photos, localizer.locate(photos, k=1), strict=True):
        if isinstance(answer, PhotoError):  # a broken photo; the others are answered
            print(f"{photo.name}\t{answer.reason}")
        else:
            print(f"{photo.name}\t{answer[0].path}\t{answer[0].utm}")


if __name__ == "__main__":
    main(*sys.argv[1:])
