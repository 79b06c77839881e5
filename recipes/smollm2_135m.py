"""SmolLM2-135M-Instruct on GSM8K test questions, as policy and as judge: a real model on real data, without a GPU.

Before it: `python tools/prepare_smollm.py` and `python tools/prepare_data.py gsm8k-test --out build/gsm8k-test.jsonl`.
"""

from recipes.common import Placed, factories
from recipes.places import Nodes
from recipes.trees import changed, written

NAME = "smollm2_135m"


def placed(directory: str, stage: dict, nodes: int, **changes) -> Placed:
    """Return the run of `make demo-smollm` with that stage alone; the trainer on one node, the servers on another."""
    tree = changed(written("demo-smollm"), directory=f"runs/{NAME}/{directory}", stages=[stage], **changes)
    return Placed(Nodes(trainer=1, policy=nodes - 1, gpus=0), tree)


def stages() -> tuple[dict, dict]:
    """Priming and sparse-reward RL."""
    first, second = written("demo-smollm")["stages"]
    return first, second


def prime(nodes: int) -> Placed:
    """Stage 1: the outcome judge."""
    return placed("prime", stages()[0], nodes)


def sparse(nodes: int) -> Placed:
    """Stage 2; no judge from here on."""
    return placed("sparse", stages()[1], nodes, judge=None)


def tuned(nodes: int) -> Placed:
    """Fine-tuning on the worked solutions."""
    shared = {key: stages()[0][key] for key in ("name", "steps", "problems", "optimizer")}
    return placed("sft", shared | {"kind": "sft", "batch_size": 8}, nodes, judge=None)


def distilled(nodes: int) -> Placed:
    """The teacher sees the worked solution."""
    shared = {key: stages()[0][key] for key in ("name", "steps", "problems", "optimizer", "sampling")}
    stage = {"kind": "self-distill", "problems_per_step": 2, "group_size": 4}
    return placed("self-distill", shared | stage, nodes, judge=None)


exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(NAME, 2, prime, sparse, tuned, distilled)
