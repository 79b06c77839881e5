"""Run by test_layouts.py on four processes: the same work in many layouts."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers.layout_learning import learn, policy
from helpers.ranks import Ranks
from helpers.witness import listed, sequences

from exprl_megatron.config.losses import LossConfig
from exprl_megatron.config.policy import Layout, OptimizerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.policy.log_probs import VocabularyParallelLogProbs
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.training.loop import update
from exprl_megatron.training.trainer_log_probs import TrainerLogProbs

BASE = {
    "TP1": Layout(),
    "TP2": Layout(tp=2),
    "PP2": Layout(pp=2),
    "TP2xPP2": Layout(tp=2, pp=2),
    "VPP2": Layout(pp=2, vpp=2),
}
FEW = [("mistral", "TP2"), ("seed-oss", "TP2"), ("seed-oss", "PP2")]
"""Families whose layers are those of another, and the layouts of BASE in which that is shown."""
MORE = {
    "DP2": Layout(dp=2),
    "DP4": Layout(dp=4),
    "TP2+SP": Layout(tp=2, sequence_parallel=True),
    "TP2xDP2+SP": Layout(tp=2, dp=2, sequence_parallel=True),
    "PP2xDP2": Layout(pp=2, dp=2),
    "TP2xPP2xVPP2+SP": Layout(tp=2, pp=2, vpp=2, sequence_parallel=True),
}
VARIANTS = {
    "TP1 recompute full": (Layout(), {"recompute": "full"}, {}),
    "TP2+SP recompute full": (Layout(tp=2, sequence_parallel=True), {"recompute": "full"}, {}),
    "VPP2 recompute selective": (Layout(pp=2, vpp=2), {"recompute": "selective"}, {}),
    "DP2 not distributed": (Layout(dp=2), {}, {"distributed": False}),
    "TP2xPP2 not distributed": (Layout(tp=2, pp=2), {}, {"distributed": False}),
    "TP1 one by one": (Layout(), {"micro_batch_tokens": 1}, {}),
    "TP1 all at once": (Layout(), {"micro_batch_tokens": 10_000, "log_prob_chunk": 1000}, {}),
    "DP2 one by one": (Layout(dp=2), {"micro_batch_tokens": 1, "log_prob_chunk": 1}, {}),
}

REJECTING = {
    "TP1": Layout(),
    "DP2": Layout(dp=2),
    "TP2xDP2": Layout(tp=2, dp=2),
    "PP2xDP2": Layout(pp=2, dp=2),
    "TP2xPP2": Layout(tp=2, pp=2),
}
FAR = (1, 4)
"""Of the batch, the sequences that another policy sampled than the one that learns."""


def learn_rejecting(model: str, layout: Layout, root: Path, kept_alone: bool = False) -> dict:
    """Two updates with overlapped reduction, in which FAR leaves the denominator; or of the others alone.

    Each is a step whose trainer log-probs are written below `root`.
    """
    learner = policy(model, layout)
    vocabulary = learner.architecture.vocabulary
    near = -math.log(vocabulary)
    batch = [
        replace(s, rollout_log_probs=(-0.5 if i in FAR else near,) * s.response_tokens, place=divmod(i, 2))
        for i, s in enumerate(sequences(vocabulary))
        if not (kept_alone and i in FAR)
    ]
    learner.begin_stage(OptimizerConfig(lr=1e-2, eps=1e-5, overlap=True), total_steps=2)
    rejection = {} if kept_alone else {"level": "geometric", "low": 0.06, "high": 50, "in_denominator": False}
    loss = LossConfig(kl_coefficient=0, entropy_coefficient=0.01, rejection=rejection)
    stage = SimpleNamespace(loss=loss, sampling=SimpleNamespace(max_new_tokens=20, temperature=0.7))
    kept = TrainerLogProbs(root, learner.world, learner.world.rank == 0)
    run = SimpleNamespace(
        policy=learner,
        recorded=kept.recorded,
        check_update=lambda stage, metrics: None,
        apply_update=lambda gradient_scale: {
            "scale": gradient_scale,
            "grad_norm": learner.apply_update(gradient_scale).grad_norm,
        },
    )
    updates = []
    for step in (1, 2):
        updates.append(update(run, stage, batch))
        kept.write("a", step)
    kept.wait()
    written = [kept.files.read("a", step) for step in (1, 2)] if learner.world.rank == 0 else []
    written = [[(*place, values.tolist()) for place, values in found.items()] for found in written]
    named = [{name: found[name] for name in ("loss", "grad_norm", "scale")} for found in updates]
    return {"updates": named, "learned": listed(learner.log_probs(batch, 0.7)), "written": written}


def gradients_of_log_probs(world) -> dict[str, float]:
    """Largest differences from autograd on the undivided vocabulary of 11 (the last of 12 rows is padding)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 6, generator=generator)
    weight = torch.randn(12, 6, generator=generator)
    targets = torch.randint(0, 11, (9,), generator=generator)
    outer = torch.randn(2, 9, generator=generator)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    table = (whole[0] @ whole[1][:11].T / 0.7).log_softmax(-1)
    values = torch.stack([table.gather(1, targets[:, None])[:, 0], -(table.exp() * table).sum(-1)])
    (values * outer).sum().backward()

    from megatron.core import parallel_state

    group = parallel_state.get_tensor_model_parallel_group()
    rows = slice(6 * group.rank(), 6 * group.rank() + 6)
    mine = [hidden.clone().requires_grad_(), weight[rows].clone().requires_grad_()]
    ours = VocabularyParallelLogProbs.apply(*mine, targets, 0.7, 11, 4, group)
    (ours * outer).sum().backward()
    dist.all_reduce(mine[0].grad, group=group)
    errors = [ours - values, mine[0].grad - whole[0].grad, mine[1].grad - whole[1].grad[rows]]
    largest = torch.stack([error.detach().abs().max() for error in errors])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return dict(zip(("values", "hidden", "weight"), largest.tolist(), strict=True))


def main() -> None:
    ranks = Ranks()
    models = ranks.arguments["models"]
    few = dict(FEW)
    for family, name in [(f, n) for f in models if f not in few for n in BASE] + FEW:
        export, layout = ranks.out / f"{family}-{name}", BASE[name]
        work = lambda _, m=models[family], la=layout, e=export: learn(m, la, {}, {}, e)  # noqa: E731
        ranks.within(layout, work, f"{family} {name}")
    for name, layout in MORE.items():
        ranks.within(layout, lambda _, la=layout: learn(models["qwen3"], la, {}, {}), f"qwen3 {name}")
    for name, (layout, settings, optimizer) in VARIANTS.items():
        work = lambda _, v=(layout, settings, optimizer): learn(models["qwen3"], *v)  # noqa: E731
        ranks.within(layout, work, f"qwen3 {name}")
    for name, layout in REJECTING.items():
        work = lambda _, la=layout, r=ranks.out / name: learn_rejecting(models["qwen3"], la, r)  # noqa: E731
        ranks.within(layout, work, f"rejecting {name}")
    alone = lambda _: learn_rejecting(models["qwen3"], Layout(), ranks.out / "alone", kept_alone=True)  # noqa: E731
    ranks.within(Layout(), alone, "kept alone")
    for name, layout in BASE.items():

        def fresh(_, layout=layout):
            learner = policy(models["qwen2"], layout, initialize="random")
            return listed(learner.log_probs(sequences(learner.architecture.vocabulary), 1.0))

        ranks.within(layout, fresh, f"random {name}")
    ranks.within(Layout(tp=2), gradients_of_log_probs, "gradients of log-probs")
    refuse_wrong_world(ranks)
    ranks.finish()


def refuse_wrong_world(ranks: Ranks) -> None:
    ranks.join(4)
    try:
        enter_world(Layout(tp=2, dp=1))
    except UserError as error:
        ranks.results["wrong world"] = str(error)
    leave_world()


if __name__ == "__main__":
    main()
