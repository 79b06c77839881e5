"""The functions of SGLang's CPU kernels for gated delta nets that are not torch operators."""

from exprl_cpu_delta_net import convolve as causal_conv1d_fn_cpu
from exprl_cpu_delta_net import convolve_next as causal_conv1d_update_cpu
from exprl_cpu_delta_net import read_prompts as chunk_gated_delta_rule_cpu

__all__ = ["causal_conv1d_fn_cpu", "causal_conv1d_update_cpu", "chunk_gated_delta_rule_cpu"]
