"""Reads and shows what a run has written, also while it runs."""
