"""Where was this photo taken? `python examples/locate_photo.py INDEX PHOTO [WEIGHTS]`"""

from __future__ import annotations

import sys

from pairvpr import Localizer, PhotoError, UserError


def main(index: str, photo: str, weights: str | None = None) -> int:
    """Print the five best matches."""
    try:
        localizer = Localizer.open(index, weights=weights)
        matches = localizer.locate(photo, k=5)
    except PhotoError as error:
        print(f"{error.photo} can't be read: {error.reason}", file=sys.stderr)
        return 1
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for match in matches:
        print(f"{match.pair_score:8.3f}  {match.path}  {match.utm or 'position unknown'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
