"""`exprl plan` on the command line."""

import json as json_format
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from exprl_megatron.commands.named_runs import as_file
from exprl_megatron.errors import UserError

WIDE = 160
"""Columns of a plan that goes to a file or another program."""


def plan_command(
    target: Annotated[
        str | None,
        typer.Argument(help="A run's YAML, a model's directory or name (llama-3.3-70b), or a recipe (llama3p3_70b)."),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value")] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of GPUs, for which the best layout is searched. (default: as the config says)"
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="GPU: h100, h200, b200 or gb200. (default: h100; --against a run in fp32: this CPU)"),
    ] = None,
    judge: Annotated[str | None, typer.Option(help="The judge's model, with the name of a model as target.")] = None,
    train_only: Annotated[bool, typer.Option("--train-only", help="All --gpus train, and none serves.")] = False,
    stage: Annotated[str | None, typer.Option(help="Stage to plan. (default: the first)")] = None,
    prompt_tokens: Annotated[float | None, typer.Option(help="Mean length of a prompt. (default: 256)")] = None,
    response_tokens: Annotated[
        float | None, typer.Option(help="Mean length of a response. (default: half the maximum)")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of layouts to show.")] = 8,
    against: Annotated[
        Path | None, typer.Option(help="A run's directory; predictions are printed beside what it measured.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Predict what fits and how long a step takes, before anything is submitted."""
    if against is not None:
        from exprl_megatron.inspection.plan_vs_run import print_comparison

        if target is not None or gpus is not None:
            raise UserError("--against takes config and GPUs from the run; leave target and --gpus out.")
        print_comparison(against, gpu, json)
        return
    if target is None:
        raise UserError("Nothing to plan is named; give a run's YAML, a model, or --against RUN.")
    with as_file(target) as target:
        _plan(target, overrides or [], gpus, gpu, judge, train_only, stage, (prompt_tokens, response_tokens), top, json)


def _plan(target, overrides, gpus, gpu_name, judge, train_only, stage_name, lengths, top, as_json) -> None:
    """Print the plan.

    More than 7 parameters: they are the options of the command.
    """
    from rich.console import Console

    from exprl_megatron.planning.hardware import find_gpu
    from exprl_megatron.planning.plan_json import plan_to_dict
    from exprl_megatron.planning.plan_report import print_plan
    from exprl_megatron.planning.plan_request import plan_target

    found = plan_target(
        target,
        overrides,
        find_gpu(gpu_name or "h100"),
        gpus=gpus,
        judge=judge,
        train_only=train_only,
        stage_name=stage_name,
        lengths=lengths,
    )
    if as_json:
        print(json_format.dumps(plan_to_dict(found, top), indent=1))
    else:
        # Without a terminal tables are as wide as they need, unless COLUMNS says how wide that is.
        narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
        print_plan(found, Console(width=None if narrow else WIDE), top)
