"""What a rank imports; importing this does, in the fork server on a CPU (processes/fork_process.py)."""

import exprl_megatron.launch.inputs
import exprl_megatron.launch.preflight
import exprl_megatron.policy.world
import exprl_megatron.training.assemble
import exprl_megatron.training.loop  # noqa: F401
