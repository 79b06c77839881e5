"""Qwen3-235B-A22B-Instruct-2507, judged by Qwen3-32B, on 16 or 32 nodes of 8 H100.

python -m recipes exprl_then_sparse_rl --factory "qwen3_235b_a22b(nodes=32)" --dryrun --yes run.executor=slurm ...
"""

from recipes.common import Scale, Servers, factories
from recipes.large import LargeRuns
from recipes.places import Nodes

NAME = "qwen3_235b_a22b"
MODEL = "models/Qwen3-235B-A22B-Instruct-2507"
# A copy of the policy would need a node for each judge; the 32B model has eight on two.
JUDGE = "models/Qwen3-32B"

# Experts' products are small and many: what FP8 saves there is not known well enough to plan for.
PRECISION = "bf16"

# 94 layers with embedding and output layer counted in are 96 = 8 x 6 x 2; recomputation, because nothing fits without.
_STAGES = {"pp": 8, "vpp": 6, "embedding_as_layer": True, "head_as_layer": True}

JUDGED = {
    16: Scale(
        Nodes(trainer=8, policy=6, judge=2),
        # EP8 keeps a layer's experts within a node, so that tokens cross NVLink only; CP2 halves the activations.
        _STAGES | {"cp": 2, "ep": 8, "dp": 4},
        # TP8: 235B fill a node but for its KV cache.
        policy=Servers(6, tp=8),
        judge=Servers(8, tp=2),
        recompute="full",
    ),
    32: Scale(
        Nodes(trainer=20, policy=8, judge=4),
        # DP20 shards the optimizer far enough for EP4, which sends less.
        _STAGES | {"ep": 4, "dp": 20},
        policy=Servers(8, tp=8),
        judge=Servers(32),
        recompute="full",
    ),
}
UNJUDGED = {
    16: Scale(
        Nodes(trainer=8, policy=8), _STAGES | {"cp": 2, "ep": 8, "dp": 4}, policy=Servers(8, tp=8), recompute="full"
    ),
    32: Scale(Nodes(trainer=20, policy=12), _STAGES | {"ep": 4, "dp": 20}, policy=Servers(12, tp=8), recompute="full"),
}
RUNS = LargeRuns(NAME, MODEL, JUDGE, PRECISION, JUDGED, UNJUDGED)

exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(
    NAME, 16, RUNS.prime, RUNS.sparse, RUNS.tuned, RUNS.distilled
)
