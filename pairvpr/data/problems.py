"""Problems with a user's data, one line each: a check lists all of them, a run stops at the first.

Loaders add problems and continue as far as they can; when they can't, they call `raise_if_any`. A problem with a whole
part may be raised as a `UserError` inside `gathered`, so that the next part is still read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pairvpr.errors import UserError


class FoundProblemsError(UserError):
    """The first of several problems; all of them are in the `Problems` that raised it."""


class Problems:
    """Lines in the order found; each names file (or setting) and row, what was wrong and what was expected."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, line: str) -> None:
        """Record a problem and continue."""
        self.lines.append(line)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Record a `UserError` that ends the block, and continue after the block."""
        try:
            yield
        except FoundProblemsError:
            pass  # its lines are here already
        except UserError as error:
            self.add(str(error))

    def raise_if_any(self) -> None:
        """Raise `FoundProblemsError`, a `UserError` with the first line and the number of others."""
        if self.lines:
            more = len(self.lines) - 1
            ending = f" (and {more:,} more; pairvpr check_benchmark lists them)" if more else ""
            raise FoundProblemsError(self.lines[0] + ending)
