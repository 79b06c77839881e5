"""Run by test_resharded_checkpoints.py on four processes: stages cut short in one layout, continued in others."""

import hashlib

import torch
from helpers.ranks import Ranks
from helpers.witness import listed, loss_function, sequences, tokens

from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig
from exprl_megatron.policy.checkpoint import intact_checkpoint, load_checkpoint, save_checkpoint
from exprl_megatron.policy.gather import gather_buckets
from exprl_megatron.policy.policy import Policy

FOUR = Layout(tp=2, pp=2)
OTHERS = {
    "one rank": Layout(),
    "TP2xDP2+SP": Layout(tp=2, dp=2, sequence_parallel=True),
    "VPP2": Layout(pp=2, vpp=2),
    "PP4": Layout(pp=4),
}
EXPERTS = Layout(pp=2, dp=2, ep=2)
OTHERS_OF_EXPERTS = {
    "one rank": Layout(),
    "EP4": Layout(dp=4, ep=4),
    "TP2xDP2xEP2xETP2+SP": Layout(tp=2, dp=2, ep=2, etp=2, sequence_parallel=True),
    "TP2xPP2xEP2+SP": Layout(tp=2, pp=2, ep=2, sequence_parallel=True),
}
KINDS = {
    "sharded": ("qwen3", True, FOUR, OTHERS),
    "plain": ("qwen3", False, FOUR, OTHERS),
    "experts": ("qwen3-moe", True, EXPERTS, OTHERS_OF_EXPERTS),
    "plain experts": ("qwen3-moe", False, EXPERTS, {"one rank": Layout()}),
    "delta nets": ("qwen3.5", True, FOUR, {"one rank": Layout()}),
    "delta nets in bf16": ("qwen3.5", True, FOUR, {}),
}
"""The model, whether its optimizer is sharded, the layout that is cut short, and those that continue."""
BF16 = ("delta nets in bf16",)
EXTRA = {"step": 2, "counters": {"traces": 14}}


def begin(model: str, layout: Layout, distributed: bool, precision: str, seed: int = 0) -> Policy:
    lengths = {"micro_batch_tokens": 64, "max_tokens": 64}
    policy = Policy(PolicyConfig(model=model, layout=layout, precision=precision, **lengths), seed)
    optimizer = OptimizerConfig(lr=3e-3, eps=1e-5, schedule="cosine", warmup_steps=1, distributed=distributed)
    policy.begin_stage(optimizer, total_steps=6, keep_ref_policy=True)
    return policy


def learn(policy: Policy, first: int, last: int) -> list:
    """Updates number `first` to `last`, each on a batch of its own: loss, norm and rate."""
    done = []
    for number in range(first, last + 1):
        batch = sequences(policy.architecture.vocabulary, seed=number)
        metrics = policy.accumulate(batch, loss_function, 1.0, tokens(batch))
        update = policy.apply_update()
        done.append([metrics["loss"], update.grad_norm, update.learning_rate])
    return done


def state(policy: Policy) -> dict:
    """What the policy is now: log-probs, those of the stage's start, and a digest of all weights (rank 0)."""
    batch = sequences(policy.architecture.vocabulary)
    digest = hashlib.sha256()
    policy.gather_weights()
    for bucket in gather_buckets(policy.chunks, policy.architecture, policy.world, 10_000):
        for name, tensor in bucket:
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "log_probs": listed(policy.log_probs(batch, 1.0)),
        "start": listed(policy.log_probs(batch, 1.0, ref_policy=True)),
        "digest": digest.hexdigest(),
    }


def main() -> None:
    ranks = Ranks()
    for kind, (family, distributed, layout, others) in KINDS.items():
        model, root = ranks.arguments["models"][family], ranks.out / kind
        made = (distributed, "bf16" if kind in BF16 else "fp32")

        def uninterrupted(_, model=model, root=root, made=made, layout=layout):
            policy = begin(model, layout, *made)
            learn(policy, 1, 2)
            save_checkpoint(root, policy, EXTRA, keep=1)
            return {"updates": learn(policy, 3, 4), **state(policy)}

        def resumed(_, layout, model=model, root=root, made=made, again=None):
            policy = begin(model, layout, *made, seed=99)
            extra = load_checkpoint(intact_checkpoint(root)[0], policy)
            if again is not None:
                save_checkpoint(again, policy, extra, keep=1)
            return {"extra": extra, "updates": learn(policy, 3, 4), **state(policy)}

        ranks.within(layout, uninterrupted, f"{kind} uninterrupted")
        ranks.within(layout, lambda _, la=layout, work=resumed: work(_, la), f"{kind} resumed")
        for name, other in others.items():
            again = ranks.out / f"{kind}-again" if name == "one rank" else None
            ranks.within(other, lambda _, la=other, a=again, w=resumed: w(_, la, again=a), f"{kind} {name}")
        back = ranks.out / f"{kind}-again"
        if "one rank" not in others:
            continue
        ranks.within(layout, lambda _, la=layout, b=back, w=resumed: w(_, la, root=b), f"{kind} one rank and back")
    ranks.finish()


if __name__ == "__main__":
    main()
