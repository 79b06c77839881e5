"""Checks what a run needs of this machine besides software: models, problem files, and GPUs."""

from pathlib import Path

from exprl_megatron.commands.doctor import NEEDED_BY_RUN, Finding
from exprl_megatron.commands.named_runs import as_file
from exprl_megatron.config.load import load_config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.delta_net_kernels import PACKAGE, has_delta_net_kernels
from exprl_megatron.problems.sources import JSON_LINES, PARQUET
from exprl_megatron.utils.accelerator import uses_cuda


def needs_of(target: str) -> list[Finding]:
    """Return a finding for each model and problem file of the run `target`, a YAML file or a recipe.

    Raises:
        UserError: there is no such run.
    """
    with as_file(target) as file:
        if not Path(file).is_file() and not Path(target).suffix:
            raise UserError(f"{target} is neither a config file nor a recipe; `python -m recipes list` names those.")
        config = load_config(file)
    models = {"policy.model": config.policy.model}
    if config.needs_judge and config.judge is not None and config.judge.model is not None:
        models["judge.model"] = config.judge.model
    return [
        *(_model(key, path) for key, path in models.items()),
        *_kernels(config.policy.model),
        *map(_problems, _sources(config)),
    ]


def _model(key: str, path: str) -> Finding:
    there = (Path(path) / "config.json").is_file()
    part = f"{NEEDED_BY_RUN}{key}"
    return Finding(part, there, path if there else f"{path} has no config.json", "" if there else "this run")


def _kernels(model: str) -> list[Finding]:
    """Return what a policy needs only on CUDA; nothing where the model is missing, which is a finding of its own."""
    if not uses_cuda() or not (Path(model) / "config.json").is_file():
        return []
    architecture = read_architecture(model)
    if architecture.delta_net is None:
        return []
    there = has_delta_net_kernels()
    found = PACKAGE if there else f"{PACKAGE} is not installed"
    return [Finding(f"{NEEDED_BY_RUN}flash-linear-attention", there, found, "" if there else "this run")]


def _sources(config: RunConfig) -> list[str]:
    return list(dict.fromkeys(problems.source for problems in config.problem_sets()))


def _problems(source: str) -> Finding:
    """Check that a path exists; any other name may be of the hub, or of the user's own code."""
    path, part = Path(source).expanduser(), f"{NEEDED_BY_RUN}problems"
    if path.exists():
        return Finding(part, True, source)
    if path.suffix in JSON_LINES + PARQUET or source.startswith(("/", ".", "~")):
        return Finding(part, False, f"there is no {source}", "this run")
    return Finding(part, True, f"{source}, which is not a path here: a data set of the hub, or a function")
