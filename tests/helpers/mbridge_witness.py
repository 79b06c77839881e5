"""mbridge 0.15.1 on this machine: an independent hand that fills and reads the policy's model."""

import re
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoConfig

# Before mbridge imports Megatron.
from exprl_megatron.policy import cpu_platform

# isort: split
import mbridge.core.bridge
import mbridge.core.util
from mbridge import AutoBridge
from mbridge.models.qwen2 import Qwen2Bridge

from exprl_megatron.models.architecture import padded_vocabulary
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.policy import Policy

# As Megatron does, it allocates on "the CUDA device".
mbridge.core.util.torch = mbridge.core.bridge.torch = cpu_platform.VIEW

_EXPERT = re.compile(r"experts\.local_experts\.(\d+)\.(\w+)\.weight")


class Grouped:
    """A chunk of the policy whose experts are named as on CUDA, the only names of experts that mbridge knows."""

    def __init__(self, chunk: torch.nn.Module):
        self._chunk = chunk
        self.decoder = chunk.decoder

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return views of the parameters: what is copied into them is in the model."""
        return {_grouped(name): parameter for name, parameter in self._chunk.state_dict().items()}

    def named_parameters(self):
        """As a module's."""
        return ((_grouped(name), parameter) for name, parameter in self._chunk.named_parameters())


# mbridge notes a tied output layer in a table that all Qwen2 and Qwen3 models of the process share.
@patch.dict(Qwen2Bridge._DIRECT_MAPPING)
@torch.no_grad()
def refill(policy: Policy, model: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Forget the policy's parameters, and fill them by mbridge from the Hugging Face files of `model`.

    Which of this rank's parameters are then not, bit for bit, what they were; and what mbridge exports of them
    (the same on every rank). A collective.
    """
    config = AutoConfig.from_pretrained(model)
    bridge = AutoBridge.from_config(config, dtype=torch.float32, make_vocab_size_divisible_by=1)
    # Set by mbridge where it builds the model itself.
    bridge.vocab_size = policy.architecture.vocabulary
    bridge.padded_vocab_size = padded_vocabulary(policy.architecture, policy.config.layout.tp)
    chunks = [Grouped(chunk) for chunk in policy.chunks]
    ours = []
    for index, chunk in enumerate(policy.chunks):
        for name, parameter in named_weights(chunk):
            ours.append((f"{index}.{name}", parameter, parameter.clone()))
            parameter.fill_(torch.nan)
    bridge.load_weights(chunks, str(model))
    differing = [name for name, parameter, before in ours if not torch.equal(parameter, before)]
    return differing, {name: tensor.clone() for name, tensor in bridge.export_weights(chunks)}


def _grouped(name: str) -> str:
    return _EXPERT.sub(r"experts.\2.weight\1", name)
