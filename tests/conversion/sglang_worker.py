"""Run by test_fp8.py with the CPU backend of the servers: what SGLang makes of quantized matrices and of a config."""

import json
import sys

import torch
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant


def main() -> None:
    given, out = sys.argv[1:]
    asked = torch.load(given)
    weights = [block_quant_dequant(values, scale, [128, 128], torch.float32) for values, scale in asked["matrices"]]
    config = Fp8Config.from_config(json.loads(asked["config"]))
    understood = {
        "serialised": config.is_checkpoint_fp8_serialized,
        "activations": config.activation_scheme,
        "block": config.weight_block_size,
        "ignored": config.ignored_layers,
    }
    torch.save({"weights": weights, "config": understood}, out)


if __name__ == "__main__":
    main()
