"""The target of `exprl plan`: a run's YAML, a model's directory, or the name of a published model."""

import difflib
from pathlib import Path

from omegaconf import OmegaConf

from exprl_megatron.config.load import load_config, resolve_config
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, read_architecture

PUBLISHED = Path(__file__).parent / "architectures"


def find_config(target: str, overrides: list[str], judge: str | None = None) -> tuple[RunConfig, bool]:
    """Return the config to plan, and whether it is a real run's rather than made up around a model.

    Around a model it is sparse-reward RL, or with a judge ExpRL-Outcome, of 128 problems with 16 traces of up to 4,096
    tokens. Raises UserError where there is neither file nor model.
    """
    if Path(target).suffix in (".yaml", ".yml"):
        # The plan is for GPUs, also where this machine has none.
        return load_config(target, overrides).with_precision(cuda=True), True
    find_architecture(target)
    return resolve_config(OmegaConf.create(_around(target, judge)), overrides, target).with_precision(cuda=True), False


def find_architecture(model: str) -> tuple[Architecture, str | None]:
    """Return the architecture of a model's directory, or the published one that its name begins with.

    For a published one, its name is returned too, unless it is all that was given.

    Raises:
        UserError: `model` is neither.
    """
    if (Path(model) / "config.json").is_file():
        return read_architecture(model), None
    known = sorted(path.name for path in PUBLISHED.iterdir() if path.is_dir())
    asked = Path(model).name.lower()
    fitting = [name for name in known if asked == name or asked.startswith(name + "-")]
    if not fitting:
        near = difflib.get_close_matches(asked, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the planner knows {', '.join(known)}."
        raise UserError(f"{model} is neither a directory with config.json nor a published model; {hint}")
    name = max(fitting, key=len)
    return read_architecture(PUBLISHED / name), name if name != model else None


def assumed_architecture(model: str, known: str) -> str:
    """Return the sentence about a model that is not on this machine."""
    return f"{model} is not here: its shape is taken to be that of {known}."


def _around(model: str, judge: str | None) -> dict:
    stage = {
        "name": "rl",
        "kind": "exprl-outcome" if judge else "sparse-rl",
        "steps": 1,
        "problems": {"source": "problems.jsonl"},
        "problems_per_step": 128,
        "group_size": 16,
        "sampling": {"max_new_tokens": 4096},
    }
    tree = {
        "directory": "runs/planned",
        "policy": {"model": model, "precision": "bf16", "max_tokens": 8192, "micro_batch_tokens": 8192},
        "stages": [stage],
    }
    return tree | ({"judge": {"model": judge}} if judge else {})
