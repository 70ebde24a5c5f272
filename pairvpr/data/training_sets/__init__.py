"""Photos to train on, each set read from its own download layout; see `read.py`."""
