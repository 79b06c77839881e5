"""1.1 million parameters on two CPU cores: everything that a large model's recipe does, in minutes.

python -m recipes exprl_then_sparse_rl --factory miniature --yes
"""

from omegaconf import OmegaConf

from recipes.common import Placed, factories
from recipes.places import Nodes
from recipes.trees import CONFIGS, changed, written

NAME = "miniature"


def placed(directory: str, tree: dict, nodes: int) -> Placed:
    """Return the trainer on one node, the servers on another; or all on one."""
    return Placed(Nodes(trainer=1, policy=nodes - 1, gpus=0), changed(tree, directory=f"runs/{NAME}/{directory}"))


def prime(nodes: int) -> Placed:
    """Stage 1: the outcome judge, as in `make demo`."""
    demo = written("demo")
    return placed("prime", demo | {"stages": demo["stages"][:1]}, nodes)


def sparse(nodes: int) -> Placed:
    """Stage 2 of `make demo`; no judge from here on."""
    demo = written("demo")
    return placed("sparse", demo | {"stages": demo["stages"][1:], "judge": None}, nodes)


def rival(arm: str, nodes: int) -> Placed:
    """A rival of stage 1 as in the study (docs/study.md), on its harder problems."""
    study = OmegaConf.to_container(OmegaConf.load(CONFIGS / "study.yaml"))
    return placed(arm, study["run"] | {"seed": 1, "judge": None, "stages": [study["arms"][arm]]}, nodes)


def tuned(nodes: int) -> Placed:
    """Fine-tuning on the references."""
    return rival("sft", nodes)


def distilled(nodes: int) -> Placed:
    """The teacher sees the reference."""
    return rival("self-distill", nodes)


exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(NAME, 2, prime, sparse, tuned, distilled)
