"""What every job does around its work: help, errors for people, exit codes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from pairvpr.config.compose import help_text
from pairvpr.data.storage import StorageError, reason
from pairvpr.distributed.quiet import filtered_stderr
from pairvpr.errors import IncompleteRunError, UserError


def run(job: type, work: Callable[[Sequence[str]], object]) -> int:
    """`work(arguments)` of this process. Exit codes: 0 done, 1 incomplete, 2 a user's mistake, 130 interrupted."""
    arguments = sys.argv[1:]
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(help_text(job))
        return 0
    try:
        with filtered_stderr():
            work(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except IncompleteRunError as error:
        print(f"incomplete: {error}", file=sys.stderr)
        return 1
    except StorageError as error:
        # Ray's copy of an error that a task raised has the task's traceback for its message.
        print(f"error: {reason(getattr(error, 'cause', error))}; what is finished is kept", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same line again goes on from there", file=sys.stderr)
        return 130
    return 0
