"""Qwen3.5-27B, judged by Qwen3-32B, on 4 or 8 nodes of 8 H100.

python -m recipes exprl_then_sparse_rl --factory "qwen3p5_27b(nodes=4)" --dryrun --yes run.executor=slurm ...

Seconds are those of a step as `exprl plan qwen3.5-27b` predicts them with these GPUs, the first number for what was
chosen. Three of four layers keep a state in place of keys and values, so that traces cost little memory on servers, and
a group's prompt is read once for each of its traces; they need each sequence whole on a rank, which leaves out context
parallelism. Four KV groups allow TP4 at most.
"""

from recipes.common import Scale, Servers, factories
from recipes.large import LargeRuns
from recipes.places import Nodes

NAME = "qwen3p5_27b"
MODEL = "models/Qwen3.5-27B"
# Which ordinary servers answer; the policy's own need the settings that this project gives them.
JUDGE = "models/Qwen3-32B"

# FP8 is refused for gated delta nets.
PRECISION = "bf16"

# 64 layers, embedding and output layer counted in, are 66 = 2 x 3 x 11.
_ENDS = {"embedding_as_layer": True, "head_as_layer": True}

JUDGED = {
    4: Scale(
        # 379 s; 20 GPUs as trainers would make it 359 s, and three servers beside two of the judge 401 s.
        Nodes(trainer=2, policy=2, judge=0),
        # Two stages of TP4 need no recomputation: 132 s, with four stages 148 s; VPP3 needs 1.5 GiB too much.
        {"tp": 4, "pp": 2, "dp": 2},
        policy=Servers(2, tp=4),
        judge=Servers(4, tp=2),
    ),
    8: Scale(
        # 209 s; with four nodes of trainers, three that sample and one that judges 220 s.
        Nodes(trainer=5, policy=2, judge=1),
        # DP5 shards the optimizer far enough for three virtual stages.
        _ENDS | {"tp": 4, "pp": 2, "vpp": 3, "dp": 5},
        # TP8 would be slower (212 s), for it cuts four KV groups no further.
        policy=Servers(4, tp=4),
        judge=Servers(4, tp=2),
    ),
}
UNJUDGED = {
    # 247 s.
    4: Scale(Nodes(trainer=2, policy=2), {"tp": 4, "pp": 2, "dp": 2}, policy=Servers(4, tp=4)),
    # The judge's node samples: 148 s, with 4 and 4 nodes 153 s.
    8: Scale(Nodes(trainer=5, policy=3), _ENDS | {"tp": 4, "pp": 2, "vpp": 3, "dp": 5}, policy=Servers(6, tp=4)),
}
RUNS = LargeRuns(NAME, MODEL, JUDGE, PRECISION, JUDGED, UNJUDGED)

exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(
    NAME, 8, RUNS.prime, RUNS.sparse, RUNS.tuned, RUNS.distilled
)
