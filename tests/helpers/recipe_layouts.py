"""The layouts of the recipes for H100 nodes of 8: what `make test-te` builds every rank of."""

from exprl_megatron.config.policy import Layout

RECIPES = {
    "llama-3.3-70b": Layout(tp=4, pp=4, vpp=5, cp=2, dp=2, sequence_parallel=True),
    "qwen2.5-72b": Layout(tp=4, pp=4, vpp=5, cp=2, dp=2, sequence_parallel=True),
    "qwen3-32b": Layout(tp=4, pp=2, vpp=4, dp=4, sequence_parallel=True),
    "qwen3-235b-a22b": Layout(
        tp=2,
        pp=8,
        vpp=4,
        ep=32,
        dp=16,
        sequence_parallel=True,
        embedding_as_layer=True,
        head_as_layer=True,
    ),
    "glm-4.5-air": Layout(
        tp=2,
        pp=4,
        vpp=3,
        ep=8,
        dp=4,
        sequence_parallel=True,
        embedding_as_layer=True,
        head_as_layer=True,
    ),
    "olmo-3-32b": Layout(tp=4, pp=2, vpp=3, dp=5, sequence_parallel=True, embedding_as_layer=True, head_as_layer=True),
    "qwen3.5-27b": Layout(tp=4, pp=2, vpp=3, dp=5, sequence_parallel=True, embedding_as_layer=True, head_as_layer=True),
}
ON_TE = RECIPES | {"qwen3.5-35b-a3b": Layout(tp=2, pp=2, ep=8, dp=4, sequence_parallel=True)}
"""Those, and what is built on Transformer Engine's layers alone."""
BF16_ALONE = ("qwen3.5-27b", "qwen3.5-35b-a3b")
"""Those that every FP8 kind is refused for."""
