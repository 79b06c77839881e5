"""The user's own code in a run: how it is found, called, and named where it fails (docs/extending.md)."""
