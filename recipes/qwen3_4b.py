"""Qwen3-4B-Instruct-2507: the paper's runs in their recommended form (configs/paper), on 1 or 2 nodes of 8 H100.

python -m recipes exprl_then_sparse_rl --factory qwen3_4b --dryrun --yes run.executor=slurm ...
"""

from recipes.common import STAGE_2, Placed, Scale, Servers, at_scale, factories, paper, pick
from recipes.places import Nodes

NAME = "qwen3_4b"

JUDGED = {
    # As released: six GPUs take turns between learning and sampling, two judge.
    1: Scale(Nodes(trainer=1), {"tp": 2, "dp": 3}, Servers(6), Servers(2), recompute="selective", colocated=True),
    # Nobody waits for a turn: the trainer's node is full, of the other's GPUs six sample and two judge.
    2: Scale(Nodes(trainer=1, policy=1, judge=0), {"tp": 2, "dp": 4}, Servers(6), Servers(2), recompute="selective"),
}
# Micro-batches of 32,768 and 40,960 tokens, the longest traces, need recomputation.
UNJUDGED = {
    2: Scale(Nodes(trainer=1, policy=1), {"tp": 2, "dp": 4}, Servers(8), recompute="full"),
    # As released: four GPUs train, four sample.
    1: Scale(Nodes(trainer=1), {"tp": 2, "dp": 2}, Servers(4), recompute="full"),
}


def prime(nodes: int) -> Placed:
    """Stage 1: ExpRL-Process with DeltaNorm, the paper's main method."""
    return _placed("prime", "qwen3-4b-process-delta", JUDGED, nodes)


def sparse(nodes: int) -> Placed:
    """Stage 2, the same for every arm."""
    return _placed("sparse", STAGE_2, UNJUDGED, nodes)


def tuned(nodes: int) -> Placed:
    """Fine-tuning on the references."""
    return _placed("sft", "qwen3-4b-sft", UNJUDGED, nodes)


def distilled(nodes: int) -> Placed:
    """Self-distillation."""
    return _placed("self-distill", "qwen3-4b-self-distill", UNJUDGED, nodes)


def _placed(directory: str, run: str, scales: dict[int, Scale], nodes: int) -> Placed:
    return at_scale(paper(run), pick(NAME, scales, nodes), f"runs/{NAME}/{directory}", {})


exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(NAME, 2, prime, sparse, tuned, distilled)
