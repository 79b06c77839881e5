"""How far each family's tiny random model is from transformers' where it is trained, converted and served.

For each family the largest difference of a log-prob (seven sequences, packed and padded), the relative difference of
the gradient's norm, whether the conversion to Megatron and back is bit-equal, and the largest difference of a served
log-prob, of SGLang servers of one rank and of two. All in fp32 on a CPU. docs/models.md has the table.

    python tools/family_table.py [--families NAME ...] [--no-servers]
"""

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.tiny_models import write_tiny_model  # noqa: E402
from helpers.witness import expectation, largest_difference, listed, loss_function, sequences, tokens  # noqa: E402

from exprl_megatron.config.policy import Layout, OptimizerConfig, PolicyConfig  # noqa: E402
from exprl_megatron.config.serving import ServerConfig  # noqa: E402
from exprl_megatron.conversion.to_hf import convert_to_huggingface  # noqa: E402
from exprl_megatron.conversion.to_megatron import convert_to_megatron  # noqa: E402
from exprl_megatron.conversion.weights import open_weights  # noqa: E402
from exprl_megatron.policy.policy import Policy  # noqa: E402
from exprl_megatron.policy.world import enter_world, leave_world  # noqa: E402
from exprl_megatron.serving.server_process import start_servers  # noqa: E402
from exprl_megatron.serving.server_spec import ServerSpec  # noqa: E402

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 0.5}
ROPE = {
    "llama": YARN,
    "qwen2": YARN,
    "qwen3": YARN,
    "qwen3-moe": LINEAR,
    "mixtral": None,
    "mistral": YARN,
    "seed-oss": LINEAR,
    "glm4-moe": None,
    "olmo3": None,
    "qwen3.5": None,
    "qwen3.5-moe": None,
}
"""RoPE scaling of each family; None: the family has none, or its own."""
PROMPT, TEMPERATURE = list(range(3, 100)), 0.7
COLUMNS = ("family", "log-prob", "gradient norm", "round trip", "served, tp 1", "served, tp 2")


@dataclass(frozen=True)
class Trained:
    """Against transformers with autograd."""

    log_prob: float
    grad_norm: float
    """Relative."""


def trained(model: Path) -> Trained:
    """Return the larger difference of both ways to lay sequences out, in one process."""
    batch = sequences(128)
    expected, gaps, norms = expectation(model, batch, TEMPERATURE), [], []
    enter_world(Layout())
    for packing in (True, False):
        config = PolicyConfig(model=str(model), max_tokens=64, micro_batch_tokens=64, packing=packing)
        policy = Policy(config, seed=0)
        gaps.append(largest_difference(listed(policy.log_probs(batch, TEMPERATURE)), expected["log_probs"]))
        policy.begin_stage(OptimizerConfig(), total_steps=1)
        policy.accumulate(batch, loss_function, TEMPERATURE, tokens(batch))
        norms.append(abs(policy.apply_update().grad_norm / expected["grad_norm"] - 1))
    leave_world()
    return Trained(max(gaps), max(norms))


def comes_back(model: Path, directory: Path) -> bool:
    """Return whether every tensor is bit-equal after Megatron's files and Hugging Face's again."""
    convert_to_megatron(model, directory / "megatron")
    convert_to_huggingface(open_weights(directory / "megatron"), directory / "back")
    before, after = (
        {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}
        for path in (model, directory / "back")
    )
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def served(model: Path, tp: int, logs: Path) -> float:
    """Return the largest difference of 160 sampled tokens' log-probs, behind prompts of 40 to 97 tokens."""
    prompts = [PROMPT[: 40 + 19 * number] for number in range(4)]

    async def ask(server):
        async with server.client() as client:
            settings = {"temperature": TEMPERATURE, "max_new_tokens": 40}
            asked = (client.generate(prompt, seed=number, **settings) for number, prompt in enumerate(prompts))
            return await asyncio.gather(*asked)

    config = ServerConfig(tp=tp, request_deadline_s=120, max_total_tokens=8192)
    with start_servers([ServerSpec("policy-0", model, config, logs)])[0] as server:
        generations = asyncio.run(ask(server))
    loaded, worst = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), 0.0
    for prompt, generation in zip(prompts, generations, strict=True):
        ids = torch.tensor([[*prompt, *generation.token_ids]])
        with torch.no_grad():
            table = torch.log_softmax(loaded(ids).logits[0, len(prompt) - 1 : -1] / TEMPERATURE, dim=-1)
        expected = table.gather(1, ids[0, len(prompt) :, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(generation.log_probs.tolist())).abs().max().item())
    return worst


def row(family: str, directory: Path, servers: bool) -> str:
    """Return a family's line."""
    layers = {"layers": 4} if family in ("olmo3", "qwen3.5") else {}
    model = write_tiny_model(directory / "model", family, rope=ROPE[family], **layers)
    learned = trained(model)
    cells = [f"{learned.log_prob:.1e}", f"{learned.grad_norm:.1e}"]
    cells.append("bit-equal" if comes_back(model, directory) else "DIFFERENT")
    for tp in (1, 2):
        cells.append(f"{served(model, tp, directory):.1e}" if servers else "not run")
    return f"| `{family}` | {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=ROPE, default=list(ROPE))
    parser.add_argument("--no-servers", action="store_true")
    args = parser.parse_args(arguments)
    torch.use_deterministic_algorithms(True)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for family in args.families:
        with tempfile.TemporaryDirectory() as directory:
            print(row(family, Path(directory), not args.no_servers), flush=True)


if __name__ == "__main__":
    main()
