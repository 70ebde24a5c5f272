"""The commands: `python -m ray_jobs.evaluate ...`, on a laptop or under `ray job submit`."""

import sys

from pairvpr.needed import NEEDED, lack


def _check_packages() -> None:
    """End with one line where packages are missing that the job of `python -m ray_jobs.JOB` imports.

    Python imports this package first, and sets `sys.argv[0]` only then.
    """
    if sys.argv[:1] != ["-m"]:
        return
    words = [word.removeprefix("-m") for word in sys.orig_argv]
    jobs = [word.removeprefix("ray_jobs.") for word in words if word.startswith("ray_jobs.")]
    line = lack(NEEDED.get(jobs[0], ())) if jobs else None
    if line is not None:
        print(f"error: {line}", file=sys.stderr)
        raise SystemExit(2)


_check_packages()
