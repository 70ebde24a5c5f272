"""Silences library warnings that are irrelevant to users."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def ignore_warnings(*, module: str, message: str = "") -> None:
    """Ignore warnings of `module` that begin with `message` (regular expressions), in the whole process from now on.

    Filters are process-wide: `warnings.catch_warnings` in one thread removes filters that another thread sets
    meanwhile. So each filter is set once and stays. Only running code sets it; importing the package sets none.
    """
    warnings.filterwarnings("ignore", message, module=module)
