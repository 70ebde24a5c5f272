"""What is wrong with a user's data, one line each: a check lists all of them, a run stops with the first.

Loaders add what they find and go on as far as they can; they call `raise_if_any` where they can't go on. What is
wrong with a part as a whole may be raised as a `UserError` inside `gathered`, so that the next part is still read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pairvpr.errors import UserError


class FoundProblemsError(UserError):
    """The first of the problems that were found; all of them are in the `Problems` that raised it."""


class Problems:
    """Lines that each name file (or setting) and row, what was wrong and what was expected, in the order found."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Note one problem and go on."""
        self.lines.append(line)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Note the `UserError` that ends the block, and go on behind it."""
        try:
            yield
        except FoundProblemsError:
            pass  # its lines are here already
        except UserError as error:
            self.add(str(error))

    def raise_if_any(self) -> None:
        """Raise `FoundProblemsError`, a `UserError`: the first line, and how many more there are."""
        if self.lines:
            more = len(self.lines) - 1
            ending = f" (and {more:,} more; ray_jobs.check_benchmark lists them)" if more else ""
            raise FoundProblemsError(self.lines[0] + ending)
