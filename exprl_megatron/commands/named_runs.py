"""Targets of commands: a run's YAML file, or the name of a recipe."""

import difflib
import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from exprl_megatron.errors import UserError

if TYPE_CHECKING:
    from exprl_megatron.config.run import RunConfig


@contextmanager
def as_file(target: str) -> Iterator[str]:
    """Yield the path of a YAML file with the run of a recipe, where `target` names one; else `target` itself.

    Raises:
        UserError: `target` is neither a file nor a model nor a recipe, but near to the name of a recipe.
    """
    if Path(target).exists() or not is_recipe(target):
        near = difflib.get_close_matches(target.partition("/")[0], recipe_names(), n=1, cutoff=0.8)
        try:
            yield target
        except UserError as error:
            if near and not Path(target).exists():
                raise UserError(f"{error} There is a recipe {near[0]}.") from error
            raise
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(yaml.safe_dump(recipe_run(target).model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        yield str(file)


def is_recipe(name: str) -> bool:
    """Return whether `name` is the module of a recipe, as `MODEL` or `MODEL/STAGE`; NeMo-Run is not imported
    for that.
    """
    found = importlib.util.find_spec("recipes")
    model = name.partition("/")[0]
    if found is None or not found.submodule_search_locations or not model.isidentifier():
        return False
    return any(_is_model(Path(folder) / f"{model}.py") for folder in found.submodule_search_locations)


def _is_model(module: Path) -> bool:
    return module.is_file() and "\nNAME = " in module.read_text(encoding="utf-8")


def recipe_names() -> list[str]:
    """Return the models that have recipes."""
    found = importlib.util.find_spec("recipes")
    folders = [] if found is None else found.submodule_search_locations or []
    return sorted(path.stem for folder in folders for path in Path(folder).glob("*.py") if _is_model(path))


def recipe_run(name: str) -> "RunConfig":
    """Return the run of a recipe.

    Raises:
        UserError: NeMo-Run is not installed, or there is no such recipe.
    """
    if importlib.util.find_spec("nemo_run") is None:
        raise UserError(f"{name} is a recipe, and NeMo-Run is not installed; install exprl-megatron[launch].")
    # By name: the recipes are not part of this package.
    return importlib.import_module("recipes.lookup").recipe_config(name)
