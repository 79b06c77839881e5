"""Conversion between model directories in Hugging Face form and Megatron's torch_dist files, by one process."""

import exprl_megatron.policy  # noqa: F401 - prepares Megatron for this machine, before anything imports it
