"""Every family in one process, packed and padded, against transformers; test_layouts.py has more layouts."""

import pytest
from helpers.witness import expectation, largest_difference, listed, loss_function, sequences, tokens

from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.policy.policy import Policy

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}
"""Of 8 pairs of dimensions the first is kept and others are stretched; most sequences end past the original length."""
MODELS = {
    "llama": YARN | {"truncate": False},
    "qwen2": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5},
    "qwen3": YARN,
    "qwen3-moe": LINEAR,
    "mistral": YARN,
    "seed-oss": LINEAR,
    "glm4-moe": None,
    "olmo3": None,
    "qwen3.5": None,
    "qwen3.5-moe": None,
}
"""Rotary settings, so that each family is seen with stretched positions; Mixtral and GLM-4.5 have none, Olmo 3 its
own."""
BATCH = sequences(128)


@pytest.mark.parametrize("family", MODELS)
def test_log_probs_and_gradient_norm_are_those_of_transformers(tiny_model, world, family):
    directory = tiny_model(family, rope=MODELS[family])
    expected = expectation(directory, BATCH, 0.7)
    for packing in (True, False):
        config = PolicyConfig(model=str(directory), max_tokens=64, micro_batch_tokens=64, packing=packing)
        learner = Policy(config, seed=0)
        assert largest_difference(listed(learner.log_probs(BATCH, 0.7)), expected["log_probs"]) <= 1e-4
        learner.begin_stage(OptimizerConfig(), total_steps=1)
        loss = learner.accumulate(BATCH, loss_function, 0.7, tokens(BATCH))["loss"]
        assert loss == pytest.approx(expected["loss"], rel=1e-5)
        assert learner.apply_update().grad_norm == pytest.approx(expected["grad_norm"], rel=1e-5)
