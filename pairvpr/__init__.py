"""Pair-VPR at city scale: describe photos, retrieve candidates, re-rank them pair by pair."""

__version__ = "0.1.0"
