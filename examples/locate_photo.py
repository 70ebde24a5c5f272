"""Where was this photo taken?

    python examples/locate_photo.py INDEX PHOTO

INDEX is what `build_index` or `evaluate` wrote, a directory or a URL.
"""

from __future__ import annotations

import sys

from pairvpr import Localizer


def main(index: str, photo: str) -> None:
    localizer = Localizer.open(index)
    for match in localizer.locate(photo, k=5):
        where = match.utm if match.latitude is None else (match.latitude, match.longitude)
        print(f"{match.pair_score:8.2f}  {where}  {match.path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
