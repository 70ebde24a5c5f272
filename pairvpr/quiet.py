"""Warnings of libraries that tell a user of this project nothing."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def ignore_warnings(*, module: str, message: str = "") -> None:
    """From now on the whole process ignores the warnings of `module` that begin with `message` (regular expressions).

    Filters belong to the process: `warnings.catch_warnings` in one thread takes away what another one sets meanwhile.
    So each filter is set once and stays, and only by code that runs: importing the package sets none.
    """
    warnings.filterwarnings("ignore", message, module=module)
