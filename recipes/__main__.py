"""`python -m recipes`: what `nemorun recipes` does, and status, logs and end of an experiment.

python -m recipes exprl_then_sparse_rl --factory llama3p3_70b --dryrun --yes run.executor=slurm run.executor.account=me
"""

import sys
from typing import Annotated

import typer

from exprl_megatron.errors import UserError
from recipes import entrypoints, logs
from recipes.catalog import MODELS
from recipes.lookup import recipe_config
from recipes.short_errors import shorten
from recipes.trees import as_yaml

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
Experiment = Annotated[str, typer.Argument(help="Its id, or its title for the latest of that title.")]


@app.command("list")
def list_recipes() -> None:
    """Name the models; each has every one of the experiments below."""
    print("\n".join(f"{name:20} {module.__doc__.splitlines()[0]}" for name, module in MODELS.items()))


@app.command()
def resolve(
    model: Annotated[str, typer.Argument(help="As `list` names it.")],
    stage: Annotated[str, typer.Argument(help="exprl, sparse_rl, sft or self_distill.")] = "exprl",
    nodes: Annotated[int | None, typer.Option(help="(default: the recipe's own)")] = None,
) -> None:
    """Print a recipe's whole config, for `exprl plan FILE` or `exprl train FILE`."""
    print(as_yaml(recipe_config(f"{model}/{stage}", nodes)), end="")


@app.command()
def status(experiment: Experiment) -> None:
    """How the jobs of an experiment stand; exit status 1 where one has failed."""
    if not logs.print_status(experiment):
        raise typer.Exit(1)


@app.command("logs")
def show_logs(
    experiment: Experiment, lines: Annotated[int, typer.Option(min=1, help="Of each file, the last so many.")] = 20
) -> None:
    """What every component of an experiment wrote."""
    logs.print_logs(experiment, lines)


@app.command()
def cancel(experiment: Experiment) -> None:
    """End all jobs of an experiment."""
    logs.cancel(experiment)


for _entrypoint in (*entrypoints.SINGLE, entrypoints.exprl_then_sparse_rl):
    _entrypoint.cli_entrypoint.cli(app)


def main() -> None:
    """Entry point; what the user can fix is one line on stderr and exit status 2."""
    shorten(list(MODELS))
    try:
        app()
    except UserError as error:
        print(f"recipes: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
