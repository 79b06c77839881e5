"""A run's directory, its rollout log and its progress: what everything that reads a run needs."""
