"""How 70 to 72 billion parameters of 80 layers lie on 8, 16 and 32 nodes of 8 H100, in FP8.

Seconds are those of a step of Llama-3.3-70B as `exprl plan` predicts them, the first number for what was chosen.
"""

from recipes.common import Scale, Servers
from recipes.places import Nodes

# 349 s a step instead of 394 in BF16, for 3 GiB more; each step compares its log-probs with the sampler's.
PRECISION = "fp8-blockwise"

JUDGED = {
    8: Scale(
        # Five nodes are the fewest whole ones that learn without recomputation; judging hides behind sampling.
        Nodes(trainer=5, policy=2, judge=1),
        # A pipeline stage is a node: TP4 and CP2 stay on NVLink. CP1 needs 16 GiB too much, VPP2 one GiB.
        {"tp": 4, "pp": 5, "vpp": 8, "cp": 2},
        # The smallest servers with room for a KV cache beside 70B in BF16.
        policy=Servers(4, tp=4),
        judge=Servers(2, tp=4),
    ),
    16: Scale(
        # Sampling has the largest share of a step: 219 s, with 10, 4 and 2 nodes 221 s.
        Nodes(trainer=8, policy=6, judge=2),
        # DP2 shards the optimizer, which makes room for four stages in place of five.
        {"tp": 4, "pp": 4, "vpp": 10, "cp": 2, "dp": 2},
        # A step waits for its longest answers, which TP8 gives sooner: 219 s, with twelve of TP4 240 s.
        policy=Servers(6, tp=8),
        judge=Servers(4, tp=4),
    ),
    32: Scale(
        # As with 8 nodes.
        Nodes(trainer=20, policy=8, judge=4),
        # DP8 shards the optimizer so far that neither CP nor virtual stages are needed: 171 s, with VPP8 CP2 DP4 172 s.
        {"tp": 4, "pp": 5, "dp": 8},
        policy=Servers(8, tp=8),
        judge=Servers(8, tp=4),
    ),
}
UNJUDGED = {
    # The judge's node samples, and three servers of TP8 take 243 s where six of TP4 take 249 s.
    8: Scale(Nodes(trainer=5, policy=3), {"tp": 4, "pp": 5, "vpp": 8, "cp": 2}, policy=Servers(3, tp=8)),
    # Nobody waits for a judge, so that learning weighs more: 153 s, with 8 and 8 nodes 157 s.
    16: Scale(Nodes(trainer=10, policy=6), {"tp": 4, "pp": 5, "vpp": 8, "cp": 2, "dp": 2}, policy=Servers(6, tp=8)),
    # 112 s, with 24 and 8 nodes 114 s.
    32: Scale(Nodes(trainer=20, policy=12), {"tp": 4, "pp": 5, "dp": 8}, policy=Servers(12, tp=8)),
}
