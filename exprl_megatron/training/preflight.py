"""Looks at everything that a run will read before any process is started."""

from pathlib import Path

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import SftStage
from exprl_megatron.errors import UserError
from exprl_megatron.policy.architecture import check_layout, read_architecture
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.training.examples import read_examples


def check_inputs(config: RunConfig) -> None:
    """Raise UserError where the model, the layout, the problems or the examples cannot be used."""
    architecture = read_architecture(config.policy.model)
    check_layout(architecture, config.policy.layout)
    if config.policy.max_tokens > architecture.max_positions:
        raise UserError(
            f"policy.max_tokens is {config.policy.max_tokens}, more than the {architecture.max_positions} positions "
            f"that {config.policy.model} was made for; lower it."
        )
    if config.policy.initialise == "weights":
        from exprl_megatron.resharding.sources import Safetensors

        with Safetensors(config.policy.model, architecture):
            pass
    for problems in config.problem_sets():
        load_problems(problems)
    for stage in config.stages:
        if isinstance(stage, SftStage):
            read_examples(Path(stage.examples))
