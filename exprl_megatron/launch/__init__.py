"""A training run seen from outside its ranks: checks before the start, processes, nodes, signals."""
