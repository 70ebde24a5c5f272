"""Which photo a name in a user's table or list stands for: one rule for all of them.

Names change on their way from a camera to a table. A name without an exact match stands for the one photo that differs
from it only in surrounding spaces, `./`, backslashes, Unicode normal form (NFC, NFD), `%20` or the case of its
extension.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from urllib.parse import unquote

NO_PHOTO, SEVERAL = -1, -2


class Spellings:
    """The relative paths of photos, by all their spellings."""

    def __init__(self, paths: Iterable[str]) -> None:
        self._places: dict[str, int] = {}
        for place, path in enumerate(paths):
            spelling = _spelling(path)
            self._places[spelling] = SEVERAL if spelling in self._places else place

    def find(self, text: str | None) -> int:
        """The position of the path that `text` stands for; `NO_PHOTO` if there is none, `SEVERAL` if ambiguous."""
        candidates = {_spelling(text), _spelling(unquote(text))} if text else set[str]()
        found = {self._places[one] for one in candidates if one in self._places}
        return found.pop() if len(found) == 1 else SEVERAL if found else NO_PHOTO


def no_photo_text(text: str, place: int, root: str, what: str = "photo") -> str:
    """Why a name stands for no photo below `root`, from the `place` that `find` returned."""
    if place == SEVERAL:
        return f"{text!r} could be several photos in {root}; expected the name of one as it is spelt there"
    return f"no {what} {text!r} in {root}"


def _spelling(path: str) -> str:
    """A key shared by all spellings of a relative path. `..` stays, so a path outside the folder matches no photo."""
    parts = [part for part in unicodedata.normalize("NFC", path.strip()).replace("\\", "/").split("/") if part != "."]
    stem, dot, ending = parts[-1].rpartition(".") if parts else ("", "", "")
    return "/".join([*parts[:-1], stem + dot + ending.lower()])
