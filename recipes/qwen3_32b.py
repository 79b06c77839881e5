"""Qwen3-32B without thinking, judged by a frozen copy of itself, on 4 or 8 nodes of 8 H100.

python -m recipes exprl_then_sparse_rl --factory "qwen3_32b(nodes=4)" --dryrun --yes run.executor=slurm ...
"""

from recipes.common import Scale, Servers, factories
from recipes.large import LargeRuns
from recipes.places import Nodes

NAME = "qwen3_32b"
MODEL = "models/Qwen3-32B"

# As for the 70B models; 32B learn in FP8 where they would in BF16.
PRECISION = "fp8-blockwise"

JUDGED = {
    4: Scale(
        # On each of two nodes three servers sample on six GPUs and one judges on two.
        Nodes(trainer=2, policy=2, judge=0),
        # A stage is a node: TP4 and CP2 stay on NVLink.
        {"tp": 4, "pp": 2, "cp": 2},
        policy=Servers(6, tp=2),
        judge=Servers(2, tp=2),
    ),
    8: Scale(
        Nodes(trainer=4, policy=3, judge=1),
        # TP2 sends half of what TP4 does; four stages, CP2 and DP2 make room for it.
        {"tp": 2, "pp": 4, "cp": 2, "dp": 2},
        # One server a node: the longest answer is what a step waits for.
        policy=Servers(3, tp=8),
        judge=Servers(2, tp=4),
    ),
}
UNJUDGED = {
    4: Scale(Nodes(trainer=2, policy=2), {"tp": 4, "pp": 4}, policy=Servers(4, tp=4)),
    8: Scale(
        Nodes(trainer=5, policy=3),
        # 64 layers, embedding and output layer are six pieces of eleven: DP5 without recomputation.
        {"tp": 4, "pp": 2, "vpp": 3, "dp": 5, "embedding_as_layer": True, "head_as_layer": True},
        policy=Servers(3, tp=8),
    ),
}
RUNS = LargeRuns(NAME, MODEL, MODEL, PRECISION, JUDGED, UNJUDGED)

exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(
    NAME, 8, RUNS.prime, RUNS.sparse, RUNS.tuned, RUNS.distilled
)
