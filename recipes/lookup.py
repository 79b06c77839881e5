"""A recipe's run by name, `MODEL` or `MODEL/STAGE`, for `exprl plan` and `exprl doctor`."""

import difflib

from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from recipes import entrypoints
from recipes.catalog import MODELS
from recipes.trees import as_run_config

STAGES = tuple(entrypoint.__name__ for entrypoint in entrypoints.SINGLE)


def recipe_config(name: str, nodes: int | None = None) -> RunConfig:
    """Return the run of the recipe `name`, whose stage is `exprl` where none is given.

    Raises UserError, which lists the recipes, where there is none.
    """
    model, _, stage = name.partition("/")
    stage = stage or STAGES[0]
    if model not in MODELS or stage not in STAGES:
        known = MODELS if model not in MODELS else STAGES
        near = difflib.get_close_matches(model if model not in MODELS else stage, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"There is no recipe {stage} of {model}; {hint}models are {', '.join(MODELS)}, stages {', '.join(STAGES)}."
        )
    made = getattr(MODELS[model], stage)(**({} if nodes is None else {"nodes": nodes}))
    return as_run_config(made.config, model)
