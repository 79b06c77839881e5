"""The experiments of each model: stage 1, stage 2, both as one experiment, and baselines for stage 1.

`nemorun recipes exprl --factory llama3p3_70b run.executor=slurm ...`, or `python -m recipes` in place of
`nemorun recipes`. Every argument can be set on the command line: `config.stages[0].steps=20 nodes.trainer=10`.
"""

import nemo_run as run

from recipes.experiment import Job, submit
from recipes.places import Nodes, Site
from recipes.trees import as_run_config


@run.cli.entrypoint(namespace="recipes", type="experiment")
def exprl(ctx: run.cli.RunContext, config: dict, nodes: Nodes, site: Site, resume: bool = False) -> None:
    """Stage 1: priming with dense rewards from the judge."""
    _single(ctx, config, nodes, site, resume)


@run.cli.entrypoint(namespace="recipes", type="experiment")
def sparse_rl(ctx: run.cli.RunContext, config: dict, nodes: Nodes, site: Site, resume: bool = False) -> None:
    """Stage 2: reinforcement learning from right or wrong answers."""
    _single(ctx, config, nodes, site, resume)


@run.cli.entrypoint(namespace="recipes", type="experiment")
def sft(ctx: run.cli.RunContext, config: dict, nodes: Nodes, site: Site, resume: bool = False) -> None:
    """A baseline for stage 1: supervised fine-tuning on the references."""
    _single(ctx, config, nodes, site, resume)


@run.cli.entrypoint(namespace="recipes", type="experiment")
def self_distill(ctx: run.cli.RunContext, config: dict, nodes: Nodes, site: Site, resume: bool = False) -> None:
    """A baseline for stage 1: self-distillation from the starting model, which sees the reference."""
    _single(ctx, config, nodes, site, resume)


@run.cli.entrypoint(namespace="recipes", type="experiment")
def exprl_then_sparse_rl(
    ctx: run.cli.RunContext,
    prime: dict,
    sparse: dict,
    prime_nodes: Nodes,
    sparse_nodes: Nodes,
    site: Site,
    resume: bool = False,
) -> None:
    """Both stages, each a job of its own: the second starts from the weights that the first leaves.

    `sparse.policy.model` is set to them.
    """
    first = Job("prime", as_run_config(prime, "prime"), prime_nodes)
    model = f"{first.config.directory}/models/{first.config.stages[-1].name}"
    sparse["policy"]["model"] = model
    second = Job("sparse", as_run_config(sparse, "sparse"), sparse_nodes)
    submit(ctx, [first, second], site, resume)


def _single(ctx: run.cli.RunContext, config: dict, nodes: Nodes, site: Site, resume: bool) -> None:
    checked = as_run_config(config, "config")
    submit(ctx, [Job(checked.stages[0].name, checked, nodes)], site, resume)


SINGLE = (exprl, sparse_rl, sft, self_distill)
"""Those of one stage."""
