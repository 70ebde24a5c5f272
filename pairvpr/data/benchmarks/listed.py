"""Photos named by a list: each must exist and be named once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pairvpr.data.problems import Problems
from pairvpr.data.spellings import Spellings, no_photo_text


def listed_paths(
    names: Sequence[str], present: Collection[str], folder: str, where: Callable[[int], str], problems: Problems
) -> list[str | None]:
    """For each of `names`, its path among `present` (relative to `folder`); `Spellings` says how names match.

    None for a name without a photo, or for one named before. Each of these is a problem; `where` names its row.
    """
    known, paths = set(present), list[str | None]()
    others, spellings = list[str](), None
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        path, why = name, ""
        if name not in known:
            if spellings is None:
                others = list(present)
                spellings = Spellings(others)
            place = spellings.find(name)
            path, why = (others[place], "") if place >= 0 else (name, no_photo_text(name, place, folder))
        if path in first:
            problems.add(f"{where(i)}: {path} again, as in {where(first[path])}; expected each photo once")
        elif why:
            problems.add(f"{where(i)}: {why}")
        paths.append(None if why or path in first else path)
        first.setdefault(path, i)
    return paths
