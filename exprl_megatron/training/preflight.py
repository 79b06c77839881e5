"""Looks at everything that a run will read before any process is started."""

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import JudgedStage, SelfDistillStage, SftStage, SparseRlStage
from exprl_megatron.errors import UserError
from exprl_megatron.judging.judged_traces import read_judged_traces
from exprl_megatron.policy.architecture import check_layout, read_architecture
from exprl_megatron.problems.needs import Need, missing_for
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.training.examples import check_source


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
    for problems, needs in needed(config).items():
        loaded = load_problems(problems)
        lacking = [sentence for need in sorted(needs) for sentence in missing_for(loaded, need)]
        if lacking:
            raise UserError("\n".join(f"{problems.source}: {sentence}" for sentence in lacking))
    for stage in config.stages:
        if isinstance(stage, SftStage):
            check_source(stage)
    if config.judges and config.judge.gate is not None:
        read_judged_traces(config.judge.gate.traces, config.judge.gate.limit)


def needed(config: RunConfig) -> dict[ProblemsConfig, set[Need]]:
    """Every set of problems that is sampled from, with what its stages need of them."""
    found: dict[ProblemsConfig, set[Need]] = {}
    for stage in config.stages:
        if isinstance(stage, JudgedStage | SelfDistillStage):
            found.setdefault(stage.problems, set()).add("reference")
        if isinstance(stage, SparseRlStage):
            found.setdefault(stage.problems, set()).add("verification")
    if config.evaluation is not None:
        found.setdefault(config.evaluation.problems, set()).add("verification")
    return found
