"""The imports of a rank, for the fork server on a CPU (processes/fork_process.py)."""

from exprl_megatron.utils.package_names import install_fast_lookup

install_fast_lookup()

import exprl_megatron.launch.input_hashes  # noqa: E402
import exprl_megatron.launch.preflight  # noqa: E402
import exprl_megatron.policy.world  # noqa: E402
import exprl_megatron.reporting.tensorboard_tracker  # noqa: E402
import exprl_megatron.training.assemble  # noqa: E402
import exprl_megatron.training.loop  # noqa: E402, F401
