"""Checks all inputs of a run before any process is started."""

from pathlib import Path

from exprl_megatron.config.problems import ProblemsConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import JudgedStage, SelfDistillStage, SftStage, SparseRlStage
from exprl_megatron.errors import UserError
from exprl_megatron.launch.model_checks import model_violations
from exprl_megatron.launch.plugin_checks import check_plugin_code, check_plugins_on_problems
from exprl_megatron.launch.prompt_checks import check_prompts, unchecked_model
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.plugins.loading import use_plugin_path
from exprl_megatron.problems.needs import ProblemNeed, unmet_needs
from exprl_megatron.problems.sources import cached_sources, load_problems
from exprl_megatron.reporting.trackers import missing_packages
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal
from exprl_megatron.training.examples import check_source
from exprl_megatron.utils.accelerator import installation_fault
from exprl_megatron.utils.files import require_directory
from exprl_megatron.utils.required import required


def check_inputs(config: RunConfig) -> None:
    """Check the environment, the model, the layout, the problems, the examples and the user's functions.

    Each set of problems is read once. The user's functions are called on small inputs.

    Raises:
        UserError: one of them cannot be used.
        PluginError: a function of the user fails.
    """
    with cached_sources():
        _check_inputs(config)


def _check_inputs(config: RunConfig) -> None:
    if (fault := installation_fault()) is not None:
        raise UserError(fault)
    use_plugin_path(config.plugin_path)
    check_plugin_code(config)
    if found := [*missing_packages(config.trackers), *model_violations(config)]:
        raise UserError("\n".join(found))
    if config.policy.initialize == "weights":
        _check_weights(config)
    for problems, needs in required_problem_sets(config).items():
        loaded = load_problems(problems)
        lacking = [
            sentence for need in sorted(needs) for sentence in unmet_needs(loaded, need, config.verifier.domains)
        ]
        if lacking:
            raise UserError("\n".join(f"{problems.source}: {sentence}" for sentence in lacking))
    check_plugins_on_problems(config)
    for stage in config.stages:
        if isinstance(stage, SftStage):
            check_source(stage)
    if config.needs_judge and config.required_judge.placement == "policy":
        _check_alike(config.policy.model, config.required_judge.served_model)
    if config.debug.rollouts is not None:
        _check_rollouts(config)
    check_prompts(config)


def dry_run(config: RunConfig) -> str | None:
    """Check what a start would check; where a model is not on this machine, return a sentence about what was not.

    Raises:
        UserError: see `check_inputs`.
        PluginError: see `check_inputs`.
    """
    use_plugin_path(config.plugin_path)
    check_plugin_code(config)
    left_out = unchecked_model(config)
    if left_out is None:
        # Where a model is elsewhere, so may be the disk that the run is for.
        require_directory(Path(config.directory))
        check_inputs(config)
    return left_out


def _check_weights(config: RunConfig) -> None:
    from exprl_megatron.conversion.weights import open_weights
    from exprl_megatron.models.weight_readers import Safetensors
    from exprl_megatron.policy.megatron_loading import is_converted

    model = config.policy.model
    if not is_converted(model):
        with Safetensors(model, read_architecture(model)):
            return
    if config.needs_sampling_servers:
        raise UserError(
            f"policy.model is {model}, whose weights are in Megatron's format, which the sampling servers cannot read; "
            f"give the model in Hugging Face format (tools/convert_checkpoint.py to-hf)."
        )
    open_weights(Path(model))


def _check_alike(policy: str, judge: str) -> None:
    """Raise UserError where servers of `policy` cannot load the weights of `judge`, or have another vocabulary."""
    what = None
    if read_architecture(policy) != read_architecture(judge):
        what = "another architecture"
    elif len({tuple(sorted(load_tokenizer(m).get_vocab().items())) for m in (policy, judge)}) > 1:
        what = "another vocabulary"
    if what:
        raise UserError(
            f"judge.placement is policy, but judge.model ({judge}) has {what} than policy.model ({policy}), and the "
            f"same servers must load both; set judge.placement to own."
        )


def _check_rollouts(config: RunConfig) -> None:
    """Raise UserError where the run of `debug.rollouts` does not have every step."""
    journal = Journal(RunDirectory(required(config.debug.rollouts, "debug.rollouts")).journal)
    for stage in config.stages:
        lacking = sorted(set(range(1, stage.steps + 1)) - set(journal.steps(stage.name)))
        if lacking:
            raise UserError(
                f"debug.rollouts is {config.debug.rollouts}, whose rollout log does not have step {lacking[0]} of "
                f"stage {stage.name}; it has {stage.steps - len(lacking)} of {stage.steps} steps; name a run with all."
            )


def required_problem_sets(config: RunConfig) -> dict[ProblemsConfig, set[ProblemNeed]]:
    """Return every set of problems that is sampled, with what its stages need of the problems.

    With `debug.only=learning` the steps are graded already, and only a teacher needs references.
    """
    found: dict[ProblemsConfig, set[ProblemNeed]] = {}
    graded = config.debug.only != "learning"
    for stage in config.stages:
        if isinstance(stage, SelfDistillStage) or (isinstance(stage, JudgedStage) and graded):
            found.setdefault(stage.problems, set()).add("reference")
        if isinstance(stage, SparseRlStage) and stage.verifies and graded:
            found.setdefault(stage.problems, set()).add("verification")
    if config.evaluation is not None and config.has_evaluation:
        found.setdefault(config.evaluation.problems, set()).add("verification")
    return found
