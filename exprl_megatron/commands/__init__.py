"""Commands of `exprl` that reach into several rooms."""
