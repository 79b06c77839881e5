"""Log-probs of trainer and sampler without and with router replay: `python tools/router_replay_gap.py`.

A random mixture of experts is served by SGLang on a CPU, which samples traces; the trainer computes the log-probs of
the same tokens with its own routers' choice of experts and with the server's. The last column is how often, over all
tokens and layers, the trainer takes another set of experts than the server did. docs/precision.md has the table.
"""

import argparse
import asyncio
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from make_miniature import write_tokenizer
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.policy import Layout, PolicyConfig
from exprl_megatron.config.serving import RETURN_ROUTED_EXPERTS, ServerConfig
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy.policy import Policy
from exprl_megatron.policy.router_replay import layer_routers
from exprl_megatron.policy.world import enter_world, leave_world
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.generation import Generation
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import SERVED_DTYPES, ServerSpec

VOCABULARY, PROMPT_TOKENS = 96, 16
COLUMNS = ("precision", "experts of", "mean gap", "99th percentile", "largest gap", "other sets of experts")


@dataclass(frozen=True)
class Gaps:
    """|trainer - sampler| of the log-probs [tokens], and the share of choices that differ."""

    gaps: np.ndarray
    changed: float

    def row(self, precision: str, chooser: str) -> str:
        """Return a line of the table."""
        numbers = (self.gaps.mean(), np.quantile(self.gaps, 0.99), self.gaps.max())
        return f"| {precision} | {chooser} | " + " | ".join(f"{n:.1e}" for n in numbers) + f" | {self.changed:.2%} |"


def write_model(directory: Path, layers: int, experts: int, top_k: int) -> None:
    """A Qwen3-MoE of random weights, whose routers prefer some experts as a trained one's do."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=64,
        norm_topk_prob=True,
        initializer_range=0.1,
        dtype="float32",
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(directory)
    write_tokenizer(directory)


async def sampled(client: SGLangClient, prompts: np.ndarray, tokens: int, routing: Routing) -> list[Generation]:
    """Return a trace of `tokens` tokens for each prompt."""
    asked = (
        client.generate(prompt, temperature=1.0, max_new_tokens=tokens, seed=number, routing=routing)
        for number, prompt in enumerate(prompts)
    )
    return await asyncio.gather(*asked)


def own_choice(policy: Policy, sample: TrainSample) -> np.ndarray:
    """[tokens - 1, layers, top_k]: what the trainer's routers choose."""
    from megatron.core.transformer.moe.router_replay import RouterReplayAction

    routers = [router for _, router in layer_routers(policy.chunks[0])]
    for router in routers:
        router.set_router_replay_action(RouterReplayAction.RECORD)
    policy.log_probs([replace(sample, routed_experts=None)], 1.0)
    chosen = torch.stack([router.get_recorded_indices() for router in routers], dim=1)[: len(sample) - 1]
    for router in routers:
        router.clear_indices()
        router.clear_router_replay_action()
    return chosen.numpy()


def compare(model: Path, precision: str, generations: list[Generation], prompts: np.ndarray) -> dict[str, Gaps]:
    """Return the gaps with the trainer's own choice and with the server's."""
    enter_world(Layout())
    settings = {"precision": {"kind": precision}, "max_tokens": 1024, "router_replay": True}
    policy = Policy(PolicyConfig(model=str(model), **settings), seed=0)
    samples = [
        TrainSample(prompt, found.token_ids, routed_experts=found.routed_experts)
        for prompt, found in zip(prompts, generations, strict=True)
    ]
    theirs = np.concatenate([found.log_probs for found in generations])
    differing = []
    for sample in samples:
        own, sent = np.sort(own_choice(policy, sample)), np.sort(sample.routed_experts)
        differing.append((own != sent).any(axis=2))
    changed = float(np.concatenate(differing).mean())
    found = {}
    for chooser, batch, share in (
        ("the trainer", [replace(sample, routed_experts=None) for sample in samples], changed),
        ("the server", samples, 0.0),
    ):
        found[chooser] = Gaps(np.abs(np.concatenate(policy.log_probs(batch, 1.0)) - theirs), share)
    leave_world()
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--traces", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256, help="Tokens of each trace.")
    args = parser.parse_args()
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    prompts = np.random.default_rng(0).integers(3, VOCABULARY, (args.traces, PROMPT_TOKENS)).astype(np.int32)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        write_model(model, args.layers, args.experts, args.top_k)
        routing = Routing.of(read_architecture(model))
        for precision in ("fp32", "bf16"):
            config = ServerConfig(extra_args=(RETURN_ROUTED_EXPERTS,))
            spec = ServerSpec("policy-0", model, config, Path(directory), dtype=SERVED_DTYPES[precision])

            async def ask(server, routing=routing):
                async with server.client() as client:
                    return await sampled(client, prompts, args.tokens, routing)

            with start_servers([spec])[0] as server:
                generations = asyncio.run(ask(server))
            for chooser, gaps in compare(model, precision, generations, prompts).items():
                print(gaps.row(precision, chooser), flush=True)


if __name__ == "__main__":
    main()
