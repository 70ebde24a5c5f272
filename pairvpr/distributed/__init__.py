"""The same steps on Ray; nothing outside this package and `ray_jobs` imports ray."""
