"""What ranks of servers hold by SGLang's own loader is what the project's rules on names say, number by number.

Checksums and transfers go by these rules. All families, where tensor parallelism divides them and where SGLang fills
up with zeros: more ranks than KV heads, heads, a vocabulary or MLPs that ranks do not divide; and blocks of FP8.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import CONFIGS

from exprl_megatron.conversion.to_hf import convert_to_huggingface
from exprl_megatron.conversion.weights import open_weights
from exprl_megatron.serving.server_command import server_environment

pytestmark = pytest.mark.slow
SIX_HEADS = {"heads": 6, "kv_heads": 3, "hidden": 96, "vocab_size": 131}
WIDE = {"hidden": 512, "heads": 4, "kv_heads": 2, "vocab_size": 128}
MODELS = {
    # Family, settings, ranks.
    **{f"{family} on 2": (family, {"vocab_size": 131}, 2) for family in CONFIGS},
    **{
        f"{family} on 4": (family, {"vocab_size": 131}, 4)
        for family in ("llama", "qwen2", "qwen3", "qwen3-moe", "mistral", "seed-oss", "glm4-moe")
    },
    "qwen3 on 3": ("qwen3", {"vocab_size": 131}, 3),
    "six heads on 2": ("qwen2", SIX_HEADS, 2),
    "six heads on 4": ("glm4-moe", SIX_HEADS, 4),
    "qwen3.5 on 4": ("qwen3.5", {"linear_num_key_heads": 4}, 4),
    "qwen3.5-moe on 4": ("qwen3.5-moe", {"linear_num_key_heads": 4, "moe_intermediate_size": 40}, 4),
    # Refused by served_policy.py.
    "mixtral on 4": ("mixtral", {}, 4),
    "olmo3 on 4": ("olmo3", {}, 4),
}
FP8 = {
    **{f"{family} in FP8 on 2": (family, WIDE, 2) for family in ("qwen3", "olmo3", "mixtral")},
    "seed-oss in FP8 on 2": ("seed-oss", WIDE | {"head_dim": 128}, 2),
    "qwen3-moe in FP8 on 2": ("qwen3-moe", WIDE | {"moe_intermediate_size": 256}, 2),
    "glm4-moe in FP8 on 1": ("glm4-moe", WIDE | {"moe_intermediate_size": 128, "mtp": True}, 1),
    "glm4-moe in FP8 on 2": ("glm4-moe", WIDE | {"moe_intermediate_size": 256}, 2),
    # Refused by served_policy.py.
    "glm4-moe in FP8 on too many": ("glm4-moe", WIDE | {"moe_intermediate_size": 128}, 2),
}
WRONG = {
    "mixtral on 4": [f"model.layers.{n}.self_attn.{x}_proj.weight" for n in (0, 1) for x in ("o", "qkv")],
    "olmo3 on 4": [f"model.layers.{n}.self_attn.{x}_proj.weight" for n in (0, 1) for x in ("o", "qkv")],
    "glm4-moe in FP8 on too many": "ValueError: The output_size of gate's and up's weight = 64 is not divisible by "
    "weight quantization block_n = 128.",
}
"""What differs, or the error, where SGLang divides a model in another way than the rules say."""


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("loaded")
    asked = {}
    for number, (case, (family, settings, tp)) in enumerate((MODELS | FP8).items()):
        given = model = tiny_model(family, **settings)
        if case in FP8:
            given = out / str(number)
            convert_to_huggingface(open_weights(model), given, "fp8")
        asked[case] = str(given), str(model), tp
    worker = Path(__file__).with_name("loading_worker.py")
    command = [sys.executable, "-W", "ignore", str(worker), json.dumps(asked), str(out / "found.json")]
    done = subprocess.run(command, env=server_environment(os.environ, cuda=False), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "found.json").read_text())


@pytest.mark.parametrize("case", [*MODELS, *FP8])
def test_a_rank_holds_what_the_rules_say_unless_the_layout_is_refused(found, case):
    assert found[case] == WRONG.get(case, []), case
