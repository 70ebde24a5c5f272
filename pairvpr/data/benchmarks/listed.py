"""Photos that a list names: each must be there, and be named once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from pairvpr.data.problems import Problems


def check_listed(
    paths: Sequence[str], present: Collection[str], folder: str, where: Callable[[int], str], problems: Problems
) -> NDArray[np.bool_]:
    """(n,) which of `paths` (relative to `folder`) are `present` and named for the first time.

    Each of the others is a problem, whose row `where` names.
    """
    usable = np.ones(len(paths), bool)
    first: dict[str, int] = {}
    for i, path in enumerate(paths):
        if path in first:
            problems.add(f"{where(i)}: {path} again, as in {where(first[path])}; expected each photo once")
        elif path not in present:
            problems.add(f"{where(i)}: no photo {path} in {folder}")
        usable[i] = path in present and path not in first
        first.setdefault(path, i)
    return usable
