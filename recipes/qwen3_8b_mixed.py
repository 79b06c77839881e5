"""Qwen3-8B without thinking on the paper's five data sets, judged by Qwen3-4B, on 2 nodes of 8 H100.

Stage 1 is ExpRL-Outcome, the paper's 8B run, in the recommended form (configs/paper/qwen3-8b-outcome.yaml).

python -m recipes exprl_then_sparse_rl --factory qwen3_8b_mixed --dryrun --yes run.executor=slurm ...
"""

from recipes.common import STAGE_2, Placed, Scale, Servers, at_scale, factories, paper, pick
from recipes.places import Nodes
from recipes.trees import changed

NAME = "qwen3_8b_mixed"

# TP4 leaves room for micro-batches of 24,576 tokens; the other node's GPUs sample but for the judge's two.
JUDGED = {2: Scale(Nodes(trainer=1, policy=1, judge=0), {"tp": 4, "dp": 2}, Servers(6), Servers(2))}
# Self-distillation's micro-batches of 40,960 tokens need recomputation.
UNJUDGED = {2: Scale(Nodes(trainer=1, policy=1), {"tp": 4, "dp": 2}, Servers(8), recompute="full")}


def prime(nodes: int) -> Placed:
    """Stage 1: one score a trace in every domain."""
    return _placed("prime", "qwen3-8b-outcome", JUDGED, nodes)


def sparse(nodes: int) -> Placed:
    """Stage 2."""
    return _placed("sparse", STAGE_2, UNJUDGED, nodes)


def tuned(nodes: int) -> Placed:
    """Fine-tuning on the references."""
    return _placed("sft", "qwen3-8b-sft", UNJUDGED, nodes)


def distilled(nodes: int) -> Placed:
    """Self-distillation."""
    return _placed("self-distill", "qwen3-8b-self-distill", UNJUDGED, nodes)


def _placed(directory: str, run: str, scales: dict[int, Scale], nodes: int) -> Placed:
    tree, mixed = paper(run), paper("qwen3-8b-outcome")
    (stage,) = mixed["stages"]
    # Whatever the arm, the model, its prompt and the problems are the mixture's.
    tree = changed(tree, prompt=mixed["prompt"], evaluation=mixed["evaluation"])
    of_mixture = {"problems": stage["problems"]}
    return at_scale(
        tree, pick(NAME, scales, nodes), f"runs/{NAME}/{directory}", of_mixture, model=mixed["policy"]["model"]
    )


exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(NAME, 2, prime, sparse, tuned, distilled)
