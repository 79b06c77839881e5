"""`exprl show` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.sort_key import SortKey


def show_command(
    run: Annotated[Path, typer.Argument(help="A run's directory; the run may still be running.")],
    stage: Annotated[str | None, typer.Option(help="Stage to show. (default: the latest)")] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Step to show. (default: the latest; all with --problem or --abstained)"),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Show the held-out answers of an evaluation: start, STAGE or STAGE/step-N.")
    ] = None,
    problem: Annotated[str | None, typer.Option(help="Show only groups of this problem id.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="Show only the trace of this number in each group.")] = None,
    sort: Annotated[
        SortKey | None,
        typer.Option(
            help="Order, largest first; disagreement is between judge and verifier, gap between trainer and sampler."
        ),
    ] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="With --sort, put the smallest first.")] = False,
    abstained: Annotated[bool, typer.Option("--abstained", help="Show only traces with an abstention.")] = False,
    text: Annotated[
        bool, typer.Option("--text", help="Print the texts with their segments, and the judge's words.")
    ] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Print tokens on which trainer and sampler differ most (--json: all).")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of groups.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead.")] = False,
) -> None:
    """Show traces of a run with their scores, segments, advantages and judgements."""
    from exprl_megatron.runs.directory import require_run

    # Before torch is imported, which takes seconds.
    require_run(run)
    from exprl_megatron.inspection.selection import Selection
    from exprl_megatron.inspection.show import DisplayOptions, show_evaluation, show_steps

    if evaluation is not None and (stage is not None or step is not None):
        raise UserError("--evaluation names all answers of one evaluation; leave out --stage and --step.")
    selection = Selection(problem, sample, abstained, sort, ascending)
    shown = DisplayOptions(limit, text, tokens, as_json=json)
    if evaluation is not None:
        show_evaluation(run, evaluation, selection, shown)
    else:
        show_steps(run, stage, step, selection, shown)
