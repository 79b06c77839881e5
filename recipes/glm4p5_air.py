"""GLM-4.5-Air (106 billion parameters, 12 active), judged by Qwen3-32B, on 8 or 16 nodes of 8 H100.

python -m recipes exprl_then_sparse_rl --factory "glm4p5_air(nodes=16)" --dryrun --yes run.executor=slurm ...

Seconds are those of a step as `exprl plan glm-4.5-air` predicts them with these GPUs, the first number for what was
chosen. Four nodes hold it in no layout.
"""

from recipes.common import Scale, Servers, factories
from recipes.large import LargeRuns
from recipes.places import Nodes

NAME = "glm4p5_air"
MODEL = "models/GLM-4.5-Air"
# A copy of the policy would need a node for each judge; the 32B model has two on one.
JUDGE = "models/Qwen3-32B"

# Experts' products are small and many: what FP8 saves there is not known well enough to plan for.
PRECISION = "bf16"

# 46 layers with embedding and output layer counted in are 48 = 4 x 6 x 2 = 3 x 4 x 4.
_ENDS = {"embedding_as_layer": True, "head_as_layer": True}

JUDGED = {
    8: Scale(
        # Three nodes sample, since most of a step is sampling: 223 s, with two of them and two for the judge 239 s.
        Nodes(trainer=4, policy=3, judge=1),
        # EP8 keeps a layer's experts within a node; nothing fits without recomputation. 74 s, with TP2 and DP4 82 s.
        _ENDS | {"pp": 4, "vpp": 6, "ep": 8, "dp": 8},
        # TP8: a step waits for its longest answers.
        policy=Servers(3, tp=8),
        judge=Servers(2, tp=4),
        recompute="full",
    ),
    16: Scale(
        # 166 s; with 8 and 6 nodes 167 s.
        Nodes(trainer=10, policy=4, judge=2),
        # DP20 shards the optimizer far enough for EP4, which sends less.
        _ENDS | {"pp": 4, "vpp": 6, "ep": 4, "dp": 20},
        policy=Servers(4, tp=8),
        judge=Servers(8, tp=2),
        recompute="full",
    ),
}
UNJUDGED = {
    # Nobody waits for a judge, so that learning weighs more: 167 s, with 4 and 4 nodes 173 s.
    8: Scale(
        Nodes(trainer=6, policy=2),
        _ENDS | {"pp": 3, "vpp": 4, "ep": 8, "dp": 16},
        policy=Servers(2, tp=8),
        recompute="full",
    ),
    # TP2 halves the activations, so that nothing is recomputed: 121 s, with 10 and 6 nodes 122 s.
    16: Scale(Nodes(trainer=12, policy=4), _ENDS | {"tp": 2, "pp": 4, "ep": 8, "dp": 12}, policy=Servers(4, tp=8)),
}
RUNS = LargeRuns(NAME, MODEL, JUDGE, PRECISION, JUDGED, UNJUDGED)

exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(
    NAME, 8, RUNS.prime, RUNS.sparse, RUNS.tuned, RUNS.distilled
)
