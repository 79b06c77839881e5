"""Every recipe and executor, registered with NeMo-Run by being imported; the entry point of `nemorun recipes`."""

from recipes import (
    executors,
    glm4p5_air,
    llama3p3_70b,
    miniature,
    olmo3_32b,
    qwen2p5_72b,
    qwen3_4b,
    qwen3_8b_mixed,
    qwen3_32b,
    qwen3_235b_a22b,
    smollm2_135m,
)

_MODULES = (
    miniature,
    smollm2_135m,
    qwen3_4b,
    qwen3_8b_mixed,
    qwen3_32b,
    llama3p3_70b,
    qwen2p5_72b,
    qwen3_235b_a22b,
    glm4p5_air,
    olmo3_32b,
)
MODELS = {module.NAME: module for module in _MODULES}
EXECUTORS = (executors.local, executors.slurm, executors.slurm_over_ssh)
