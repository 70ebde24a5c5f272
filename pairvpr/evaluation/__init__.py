"""Recall, the results table and the report."""
