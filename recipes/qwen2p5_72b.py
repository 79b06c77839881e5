"""Qwen2.5-72B-Instruct, judged by a frozen copy of itself, on 8, 16 or 32 nodes of 8 H100.

python -m recipes exprl_then_sparse_rl --factory "qwen2p5_72b(nodes=16)" --dryrun --yes run.executor=slurm ...
"""

from recipes.common import factories
from recipes.large import LargeRuns
from recipes.scales_70b import JUDGED, PRECISION, UNJUDGED

NAME = "qwen2p5_72b"
MODEL = "models/Qwen2.5-72B-Instruct"
RUNS = LargeRuns(NAME, MODEL, MODEL, PRECISION, JUDGED, UNJUDGED)

exprl, sparse_rl, sft, self_distill, exprl_then_sparse_rl = factories(
    NAME, 8, RUNS.prime, RUNS.sparse, RUNS.tuned, RUNS.distilled
)
