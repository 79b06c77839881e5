"""Olmo 3 32B, judged by Qwen3-32B, on 4 or 8 nodes of 8 H100.

python -m recipes exprl_then_sparse_rl --factory "olmo3_32b(nodes=4)" --dryrun --yes run.executor=slurm ...

The open-data model of this size: what it was trained on before is known. Seconds are those of a step as
`exprl plan olmo-3-32b` predicts them with these GPUs, the first number for what was chosen. Attention with windows
cannot be cut by context parallelism here, so that sequences are whole on each rank.
"""

from recipes.common import Scale, Servers, factories
from recipes.large import LargeRuns
from recipes.places import Nodes

NAME = "olmo3_32b"
MODEL = "models/Olmo-3-32B"
# The policy is a base model, which follows no instruction: another model judges.
JUDGE = "models/Qwen3-32B"

# With no norm in front of them, its layers multiply the residual stream itself, which grows from layer to layer: what
# FP8 makes of that is not known.
PRECISION = "bf16"

# 64 layers, embedding and output layer counted in, are 66 = 2 x 3 x 11.
_ENDS = {"embedding_as_layer": True, "head_as_layer": True}

JUDGED = {
    4: Scale(
        # 419 s; 20 GPUs as trainers would make it 387 s, and three servers beside one judge 401 s: no whole nodes.
        Nodes(trainer=2, policy=2, judge=0),
        # TP4 on NVLink and four stages need no recomputation.
        {"tp": 4, "pp": 4},
        policy=Servers(2, tp=4),
        judge=Servers(4, tp=2),
    ),
    8: Scale(
        # 226 s; with four nodes of trainers, three that sample and one that judges 228 s.
        Nodes(trainer=5, policy=2, judge=1),
        # DP5 shards the optimizer far enough that nothing is recomputed; each stage is three pieces of eleven.
        _ENDS | {"tp": 4, "pp": 2, "vpp": 3, "dp": 5},
        policy=Servers(4, tp=4),
        judge=Servers(4, tp=2),
    ),
}
UNJUDGED = {
    # 284 s.
    4: Scale(Nodes(trainer=2, policy=2), {"tp": 4, "pp": 4}, policy=Servers(4, tp=4)),
    # Nobody waits for a judge, so that learning weighs more: 160 s.
    8: Scale(Nodes(trainer=5, policy=3), _ENDS | {"tp": 4, "pp": 2, "vpp": 3, "dp": 5}, policy=Servers(3, tp=8)),
}
RUNS = LargeRuns(NAME, MODEL, JUDGE, PRECISION, JUDGED, UNJUDGED)

exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(
    NAME, 8, RUNS.prime, RUNS.sparse, RUNS.tuned, RUNS.distilled
)
