"""Every recipe and executor, registered with NeMo-Run by being imported; the entry point of `nemorun recipes`."""

from recipes import executors, miniature

MODELS = {module.NAME: module for module in (miniature,)}
EXECUTORS = (executors.local, executors.slurm, executors.slurm_over_ssh)
