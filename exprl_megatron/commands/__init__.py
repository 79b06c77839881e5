"""Commands of `exprl` that use several packages."""
