"""Two steps of learning in any layout, and what is compared between layouts."""

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.scatter import SampleScatter
from helpers.witness import listed, loss_function, sequences, tokens


def policy(model: str, layout: Layout, **settings) -> Policy:
    settings = {"micro_batch_tokens": 64, "log_prob_chunk": 7, "max_tokens": 64, **settings}
    return Policy(PolicyConfig(model=model, layout=layout, **settings), seed=3)


def scattered(learner: Policy) -> list[list]:
    """Return the batch and its two parts, of which ranks other than 0 have only their own sequences whole."""
    batch = sequences(learner.architecture.vocabulary)
    batches = [batch, batch[:3], batch[3:]]
    found = SampleScatter(learner).scatter(batches if learner.world.rank == 0 else None)
    for part, received in zip(batches, found, strict=True):
        own = [learner.world.rank == 0 or owner == learner.world.dp_rank for owner in learner.owners(part)]
        assert [isinstance(sequence, TrainSample) for sequence in received] == own
        assert [len(sequence) for sequence in received] == [len(sequence) for sequence in part]
        assert [s for s, whole in zip(received, own, strict=True) if whole] == [
            s for s, whole in zip(part, own, strict=True) if whole
        ]
    return found


def learn(
    model: str, layout: Layout, settings: dict, optimizer: dict, export=None, updated=None, continued=None
) -> dict:
    """Log-probs, then two steps: the first's gradients come in two calls.

    `export` and `updated` are where to write the weights before and after the first step. `continued` is a model at
    whose weights the second step is made, in place of the updated ones.
    """
    learner = policy(model, layout, **settings)
    batch, *halves = scattered(learner)
    result = {"log_probs": listed(learner.log_probs(batch, 0.7))}
    if export is not None:
        learner.save_huggingface(export)
    learner.begin_stage(OptimizerConfig(lr=1e-2, eps=1e-5, **optimizer), total_steps=2)
    parts = [
        learner.accumulate(part, loss_function, 0.7, tokens(batch), more_follow=more)
        for part, more in zip(halves, (True, False), strict=True)
    ]
    for name in ("loss", "entropy"):
        result[name] = parts[0][name] + parts[1][name]
    result["gap/max"] = max(part["gap/max"] for part in parts)
    result["grad_norm"] = learner.apply_update().grad_norm
    if updated is not None:
        learner.save_huggingface(updated)
    if continued is not None:
        learner = policy(continued, layout, **settings)
        learner.begin_stage(OptimizerConfig(lr=1e-2, eps=1e-5, **optimizer), total_steps=2)
    result["second"] = learner.accumulate(batch, loss_function, 0.7, tokens(batch))["loss"]
    result["second_grad_norm"] = learner.apply_update().grad_norm
    result["learned"] = listed(learner.log_probs(batch, 0.7))
    return result
