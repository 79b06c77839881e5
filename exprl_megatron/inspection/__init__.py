"""Reads what a run has left, or is leaving, and shows it."""
