"""Every recipe and executor, registered with NeMo-Run by being imported; the entry point of `nemorun recipes`."""

from importlib import import_module

from recipes import executors, names

MODELS = {name: import_module(f"recipes.{name}") for name in names.MODELS}
EXECUTORS = (executors.local, executors.slurm, executors.slurm_over_ssh)
