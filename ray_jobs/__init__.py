"""The commands: `python -m ray_jobs.evaluate ...`, on a laptop or under `ray job submit`."""
