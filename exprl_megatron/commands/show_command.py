"""`exprl show` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from exprl_megatron.errors import UserError
from exprl_megatron.inspection.sort_key import SortKey


def show_command(
    run: Annotated[Path, typer.Argument(help="A run's directory; the run may be going on.")],
    stage: Annotated[str | None, typer.Option(help="Of this stage. (default: the latest)")] = None,
    step: Annotated[
        int | None,
        typer.Option(min=1, help="Of this step. (default: the latest; all with --problem or --abstained)"),
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Held-out answers instead: start, STAGE, STAGE/step-N.")
    ] = None,
    problem: Annotated[str | None, typer.Option(help="The groups of this problem id.")] = None,
    sample: Annotated[int | None, typer.Option(min=0, help="The trace of this number in each group.")] = None,
    sort: Annotated[
        SortKey | None,
        typer.Option(
            help="Largest first; disagreement is that of judge and verifier, gap that of trainer and sampler."
        ),
    ] = None,
    ascending: Annotated[bool, typer.Option("--ascending", help="With --sort: smallest first.")] = False,
    abstained: Annotated[bool, typer.Option("--abstained", help="Traces with an abstention.")] = False,
    text: Annotated[bool, typer.Option("--text", help="The texts with their segments, and the judge's words.")] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Tokens on which trainer and sampler differ most (--json: all of them).")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="At most so many groups.")] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Show traces of a run with their scores, segments, advantages and judgements."""
    from exprl_megatron.inspection.selection import Selection
    from exprl_megatron.inspection.show import Shown, show_evaluation, show_steps

    if evaluation is not None and (stage is not None or step is not None):
        raise UserError("--evaluation names all answers of one evaluation; leave out --stage and --step.")
    selection = Selection(problem, sample, abstained, sort, ascending)
    shown = Shown(limit, text, tokens, as_json=json)
    if evaluation is not None:
        show_evaluation(run, evaluation, selection, shown)
    else:
        show_steps(run, stage, step, selection, shown)
