"""Where errors leave a job: one line for people, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pairvpr.data.storage import StorageError, reason
from pairvpr.distributed.stderr_filter import filtered_stderr
from pairvpr.errors import IncompleteRunError, UserError


def exit_code_of(work: Callable[[], object]) -> int:
    """Run `work` in this process. 0: done, 1: incomplete, 2: a user's mistake, 130: interrupted."""
    try:
        with filtered_stderr():
            work()
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
