"""The miniature of 1.1 million parameters: everything that a large model's recipe does, on two CPU cores.

python -m recipes exprl_then_sparse_rl --factory miniature --yes
"""

import nemo_run as run
from omegaconf import OmegaConf

from recipes import entrypoints
from recipes.entrypoints import recipe, two_stage_recipe
from recipes.places import Nodes
from recipes.trees import CONFIGS, changed, written

NAME = "miniature"


def nodes() -> Nodes:
    """The trainer on one node, the servers on another."""
    return Nodes(trainer=1, policy=1, judge=0, gpus=0)


def run_of(stage: int, name: str) -> dict:
    """The demo's stage of that number, alone."""
    demo = written("demo")
    return changed(demo, directory=f"runs/{NAME}/{name}", stages=[demo["stages"][stage]])


def prime() -> dict:
    """Stage 1: the outcome judge."""
    return run_of(0, "prime")


def sparse() -> dict:
    """Stage 2; no judge from here on."""
    return changed(run_of(1, "sparse"), judge=None)


def rival(arm: str) -> dict:
    """A rival of stage 1 as in the study (docs/study.md), on its harder problems."""
    study = OmegaConf.to_container(OmegaConf.load(CONFIGS / "study.yaml"))
    return study["run"] | {"directory": f"runs/{NAME}/{arm}", "seed": 1, "stages": [study["arms"][arm]]}


@run.cli.factory(target=entrypoints.exprl, name=NAME)
def exprl() -> run.Partial:
    return recipe(entrypoints.exprl, NAME, nodes(), prime())


@run.cli.factory(target=entrypoints.sparse_rl, name=NAME)
def sparse_rl() -> run.Partial:
    return recipe(entrypoints.sparse_rl, NAME, nodes(), sparse())


@run.cli.factory(target=entrypoints.sft, name=NAME)
def sft() -> run.Partial:
    return recipe(entrypoints.sft, NAME, nodes(), rival("sft"))


@run.cli.factory(target=entrypoints.self_distill, name=NAME)
def self_distill() -> run.Partial:
    return recipe(entrypoints.self_distill, NAME, nodes(), rival("self-distill"))


@run.cli.factory(target=entrypoints.exprl_then_sparse_rl, name=NAME)
def exprl_then_sparse_rl() -> run.Partial:
    return two_stage_recipe(NAME, (nodes(), prime()), (nodes(), sparse()))
