"""Runs recipes as `nemorun recipes` does, prints status and logs of an experiment, and cancels it.

python -m recipes exprl_then_sparse_rl --factory llama3p3_70b --dryrun --yes run.executor=slurm run.executor.account=me
"""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from exprl_megatron.errors import UserError
from recipes import names

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Experiment = Annotated[str, typer.Argument(help="Its id, or its title for the latest of that title.")]


@app.command("list")
def list_recipes() -> None:
    """List the models that have recipes; each has all experiments below."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    for name in names.MODELS:
        table.add_row(name, names.model_summary(name))
    Console().print(table)


@app.command()
def resolve(
    model: Annotated[str, typer.Argument(help="As `list` names it.")],
    stage: Annotated[str, typer.Argument(help="exprl, sparse_rl, sft or self_distill.")] = "exprl",
    nodes: Annotated[int | None, typer.Option(help="(default: the recipe's own)")] = None,
) -> None:
    """Print a recipe's whole config, for `exprl plan FILE` or `exprl train FILE`."""
    from recipes.lookup import recipe_config
    from recipes.trees import as_yaml

    print(as_yaml(recipe_config(f"{model}/{stage}", nodes)), end="")


@app.command()
def status(experiment: Experiment) -> None:
    """Print the states of an experiment's jobs; exit status 1 where one has failed."""
    from recipes import logs

    if not logs.print_status(experiment):
        raise typer.Exit(1)


@app.command("logs")
def show_logs(
    experiment: Experiment, lines: Annotated[int, typer.Option(min=1, help="Number of last lines of each file.")] = 20
) -> None:
    """Print the last lines that each component of an experiment wrote."""
    from recipes import logs

    logs.print_logs(experiment, lines)


@app.command()
def cancel(experiment: Experiment) -> None:
    """End all jobs of an experiment."""
    from recipes import logs

    logs.cancel(experiment)


def add_experiments(arguments: Sequence[str]) -> None:
    """Add the experiment that the `arguments` call as NeMo-Run makes its command, and the others for the help alone."""
    called = arguments[0] if arguments else None
    for name in names.EXPERIMENTS:
        if name == called:
            _add_called(name)
        else:
            app.command(name, help=names.experiment_summary(name))(_not_called)


def _add_called(name: str) -> None:
    from recipes import entrypoints
    from recipes.catalog import MODELS
    from recipes.short_errors import shorten

    shorten(list(MODELS))
    getattr(entrypoints, name).cli_entrypoint.cli(app)


def _not_called() -> None:
    """In place of an experiment that the command line does not name."""


def main() -> None:
    """Entry point; what the user can fix is one line on stderr and exit status 2."""
    add_experiments(sys.argv[1:])
    try:
        app()
    except UserError as error:
        print(f"recipes: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
