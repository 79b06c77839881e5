"""Run by test_wide_layouts.py on eight processes: experts, uneven pipelines, overlap, context parallelism with all."""

import torch
from helpers.layout_learning import learn, policy
from helpers.ranks import Ranks
from helpers.witness import equal_sequences, listed, loss_function, sequences, tokens, with_experts

from exprl_megatron.config.policy import Layout, OptimizerConfig
from exprl_megatron.policy import overlap
from exprl_megatron.policy.scatter import SampleScatter

SP = {"sequence_parallel": True}
DENSE = {
    "TP1": Layout(),
    "TP2xPP2xDP2+SP": Layout(tp=2, pp=2, dp=2, **SP),
    "TP2xCP2xPP2+SP": Layout(tp=2, cp=2, pp=2, **SP),
    "CP4xDP2": Layout(cp=4, dp=2),
    "CP2xPP2xVPP2xDP2": Layout(cp=2, pp=2, vpp=2, dp=2),
}
EXPERTS = {
    "TP1": Layout(),
    "PP2": Layout(pp=2),
    "EP2": Layout(dp=2, ep=2),
    "EP4": Layout(dp=4, ep=4),
    "EP2xDP4": Layout(dp=4, ep=2),
    "ETP2": Layout(dp=2, etp=2),
    "CP2xEP2": Layout(cp=2, ep=2),
    "TP2+SP": Layout(tp=2, **SP),
    "TP2xETP2+SP": Layout(tp=2, etp=2, **SP),
    "TP2xEP2+SP": Layout(tp=2, ep=2, **SP),
    "TP2xDP2xEP2xETP2+SP": Layout(tp=2, dp=2, ep=2, etp=2, **SP),
    "PP2xEP2": Layout(pp=2, dp=2, ep=2),
    "PP2xVPP2xEP2": Layout(pp=2, vpp=2, dp=2, ep=2),
    "TP2xPP2xDP2xEP4+SP": Layout(tp=2, pp=2, dp=2, ep=4, **SP),
    "TP2xPP2xDP2xEP2xETP2+SP": Layout(tp=2, pp=2, dp=2, ep=2, etp=2, **SP),
    "TP2xCP2xDP2xEP4xETP2+SP": Layout(tp=2, cp=2, dp=2, ep=4, etp=2, **SP),
}
UNLIKE = {name: EXPERTS[name] for name in ("TP1", "PP2", "EP2", "TP2+SP", "PP2xVPP2xEP2", "TP2xDP2xEP2xETP2+SP")}
"""Of a model with a dense layer, a shared expert in the others, and a bias in their routers."""
WINDOWS = {
    "TP1": Layout(),
    "PP2": Layout(pp=2),
    "TP2xPP2xDP2+SP": DENSE["TP2xPP2xDP2+SP"],
    "PP2xVPP2xDP2": Layout(pp=2, vpp=2, dp=2),
}
"""Of a model with windows in half of its layers, and norms of queries and keys over all heads."""
DELTA_NETS = {
    "TP1": Layout(),
    "TP2": Layout(tp=2),
    "PP2": Layout(pp=2),
    "PP2xVPP2": Layout(pp=2, vpp=2),
    "TP2xPP2xDP2+SP": DENSE["TP2xPP2xDP2+SP"],
}
"""Of a model with gated delta nets in every other layer."""
DELTA_NETS_AND_EXPERTS = {name: EXPERTS[name] for name in ("TP1", "PP2", "EP2", "TP2+SP", "TP2xDP2xEP2xETP2+SP")}
"""Of one with such layers and, in all of them, experts and a shared expert with a gate."""
UNEVEN = {
    "TP1": Layout(),
    "PP2 embedding as layer": Layout(pp=2, embedding_as_layer=True),
    "PP3 both as layers": Layout(pp=3, embedding_as_layer=True, head_as_layer=True),
    "PP4 head as layer": Layout(pp=4, head_as_layer=True),
    "PP2xVPP2 head as layer": Layout(pp=2, vpp=2, head_as_layer=True),
    "PP4xEP2 embedding as layer": Layout(pp=4, dp=2, ep=2, embedding_as_layer=True),
}
"""Of a model with seven layers."""
FULL = {"recompute": "full"}
CASES = {
    f"{family} {name}": (family, layout, {}, {})
    for family, layouts in (
        ("qwen3", DENSE),
        ("qwen3-moe", EXPERTS),
        ("mixtral", UNEVEN),
        ("glm4-moe", UNLIKE),
        ("olmo3", WINDOWS),
        ("qwen3.5", DELTA_NETS),
        ("qwen3.5-moe", DELTA_NETS_AND_EXPERTS),
    )
    for name, layout in layouts.items()
} | {
    "qwen3 DP2 overlap": ("qwen3", Layout(dp=2), {}, {"overlap": True}),
    "qwen3 TP2xPP2xDP2+SP overlap": ("qwen3", DENSE["TP2xPP2xDP2+SP"], {}, {"overlap": True}),
    "qwen3 PP2xVPP2xDP2 overlap": ("qwen3", Layout(pp=2, vpp=2, dp=2), {"recompute": "full"}, {"overlap": True}),
    "qwen3-moe EP2xDP4 overlap": ("qwen3-moe", EXPERTS["EP2xDP4"], {}, {"overlap": True}),
    "qwen3-moe EP2 recompute full": ("qwen3-moe", EXPERTS["EP2"], {"recompute": "full"}, {}),
    "qwen3-moe EP2 not distributed": ("qwen3-moe", EXPERTS["EP2"], {}, {"distributed": False}),
    "glm4-moe PP2 recompute full": ("glm4-moe", EXPERTS["PP2"], {"recompute": "full"}, {}),
    "olmo3 TP2 padded": ("olmo3", Layout(tp=2), {"packing": False}, {}),
    "olmo3 PP2 recompute selective": ("olmo3", Layout(pp=2), {"recompute": "selective"}, {}),
    "olmo3 TP2xPP2xDP2+SP recompute full": ("olmo3", WINDOWS["TP2xPP2xDP2+SP"], {"recompute": "full"}, {}),
    "qwen3.5 TP2xPP2 padded, recompute full": ("qwen3.5", Layout(tp=2, pp=2), {"packing": False, **FULL}, {}),
    "qwen3.5-moe EP2 padded": ("qwen3.5-moe", EXPERTS["EP2"], {"packing": False}, {}),
    "qwen3.5-moe PP2 padded": ("qwen3.5-moe", Layout(pp=2), {"packing": False}, {}),
    "qwen3.5-moe TP2+SP padded": ("qwen3.5-moe", EXPERTS["TP2+SP"], {"packing": False}, {}),
    "qwen3.5-moe PP2xVPP2xEP2 padded": ("qwen3.5-moe", EXPERTS["PP2xVPP2xEP2"], {"packing": False}, {}),
}
"""The model, the layout, settings of the policy and of the optimizer."""
SENSITIVE = ("qwen3.5", "qwen3.5-moe")
"""Families whose second step is made at one rank's updated weights, in each layout the same.

The first update divides the gradient by its own size, so that last bits of the smallest gradients decide, and the
second gradient amplifies the difference: on one rank the order of summation alone (where the batch is cut in two)
changes its norm by 2.2e-5 for the mixture, and noise of 2e-7 in the weights changes it by 4e-6 in float64.
"""
REPLAYED = {
    "qwen3-moe TP1": ("qwen3-moe", Layout(), {}),
    "qwen3-moe PP2 recompute full": ("qwen3-moe", Layout(pp=2), FULL),
    "qwen3-moe PP2xVPP2xEP2 recompute full": ("qwen3-moe", EXPERTS["PP2xVPP2xEP2"], FULL),
    "qwen3-moe EP2": ("qwen3-moe", EXPERTS["EP2"], {}),
    "qwen3-moe TP2xEP2+SP padded": ("qwen3-moe", EXPERTS["TP2xEP2+SP"], {"packing": False}),
    "qwen3-moe CP2xEP2": ("qwen3-moe", EXPERTS["CP2xEP2"], {}),
    "qwen3-moe TP2xCP2xDP2xEP4xETP2+SP": ("qwen3-moe", EXPERTS["TP2xCP2xDP2xEP4xETP2+SP"], FULL),
    "glm4-moe TP1": ("glm4-moe", Layout(), {}),
    "glm4-moe PP2xVPP2xEP2 recompute full": ("glm4-moe", EXPERTS["PP2xVPP2xEP2"], FULL),
    "glm4-moe TP2xEP2+SP padded": ("glm4-moe", EXPERTS["TP2xEP2+SP"], {"packing": False}),
    "qwen3.5-moe TP1": ("qwen3.5-moe", Layout(), {}),
    "qwen3.5-moe TP2xEP2+SP": ("qwen3.5-moe", EXPERTS["TP2xEP2+SP"], FULL),
    "qwen3.5-moe PP2xVPP2xEP2 recompute full": ("qwen3.5-moe", EXPERTS["PP2xVPP2xEP2"], FULL),
    "mixtral TP1": ("mixtral", Layout(), {}),
    "mixtral PP3 both as layers": ("mixtral", UNEVEN["PP3 both as layers"], FULL),
}
"""With experts that no router chose: the model, the layout and settings of the policy."""
LAYERS = {"qwen3": 4, "qwen3-moe": 4, "mixtral": 7, "glm4-moe": 4, "olmo3": 4, "qwen3.5": 4, "qwen3.5-moe": 4}
BALANCED = ("TP1", "PP2", "EP2", "CP2xEP2", "TP2xEP2+SP", "TP2xDP2xEP2xETP2+SP")
BALANCE = 0.3
"""Weight of the router's load-balancing loss."""


def gradient_of_balance(model: str, layout: Layout) -> float:
    """The norm of what the load-balancing loss alone gives, with one sequence to a micro-batch and no padding."""
    learner = policy(model, layout, micro_batch_tokens=1, moe_aux_loss=BALANCE)
    learner.begin_stage(OptimizerConfig(), total_steps=1)

    def nothing(log_probs, entropy, micro):
        return 0.0 * log_probs.sum(), {}

    learner.accumulate(equal_sequences(learner.architecture.vocabulary), nothing, 1.0, denominator=7)
    return learner.apply_update().grad_norm


def second_step_at(ranks: Ranks, case: str) -> str | None:
    """The model at whose weights the second step of `case` is made; None: at its own updated ones."""
    family, _, layout = case.partition(" ")
    return str(ranks.out / "after" / f"{family} TP1") if family in SENSITIVE and layout != "TP1" else None


def learn_replaying(model: str, layout: Layout, settings: dict, layers: int, continued: str | None) -> dict:
    """Log-probs and two updates with given experts, of several micro-batches each."""
    learner = policy(model, layout, micro_batch_tokens=32, **settings)
    whole = sequences(learner.architecture.vocabulary)
    batches = [with_experts(whole, layers, experts=4, top_k=2)] if learner.world.rank == 0 else None
    (batch,) = SampleScatter(learner).scatter(batches)
    result: dict = {"log_probs": listed(learner.log_probs(batch, 0.7))}
    learner.begin_stage(OptimizerConfig(lr=1e-2, eps=1e-5), total_steps=2)
    for name in ("", "second_"):
        if name and continued is not None:
            learner = policy(continued, layout, micro_batch_tokens=32, **settings)
            learner.begin_stage(OptimizerConfig(), total_steps=1)
        result[f"{name}loss"] = learner.accumulate(batch, loss_function, 0.7, tokens(batch))["loss"]
        result[f"{name}grad_norm"] = learner.apply_update().grad_norm
    return result


def main() -> None:
    torch.set_num_threads(1)
    # Several buckets even of a tiny model.
    overlap.BUCKET_PARAMETERS = 20_000
    ranks = Ranks()
    models = ranks.arguments["models"]
    for name, (family, layout, settings, optimizer) in CASES.items():
        ranks.within(
            layout,
            lambda _, c=(models[family], layout, settings, optimizer), n=name: learn(
                *c, ranks.out / "before" / n, ranks.out / "after" / n, second_step_at(ranks, n)
            ),
            name,
        )
    for name, (family, layout, settings) in REPLAYED.items():
        arguments = (models[family], layout, settings, LAYERS[family], second_step_at(ranks, f"{family} replay"))
        ranks.within(layout, lambda _, a=arguments: learn_replaying(*a), f"replay {name}")
    for name in BALANCED:
        layout = EXPERTS[name]
        ranks.within(layout, lambda _, la=layout: gradient_of_balance(models["qwen3-moe"], la), f"balance {name}")
    ranks.finish()


if __name__ == "__main__":
    main()
