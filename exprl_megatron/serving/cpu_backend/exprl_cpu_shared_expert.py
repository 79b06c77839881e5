"""The gate of Qwen3.5's shared expert in plain torch, for the Triton kernel that SGLang starts on every device."""

import torch


def add_gated(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    final_hidden_states: torch.Tensor,
) -> None:
    """In place of SGLang's fused_gate_sigmoid_mul_add: add the gated shared expert to the routed experts, in place.

    hidden_states, shared_output and final_hidden_states (the routed experts) [tokens, hidden], gate_weight [hidden].
    The gate is one number for each token; all is computed in fp32.
    """
    gate = (hidden_states.float() @ gate_weight.float()).sigmoid()[:, None]
    final_hidden_states.copy_(final_hidden_states.float() + gate * shared_output.float())
