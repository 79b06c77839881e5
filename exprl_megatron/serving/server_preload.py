"""What an SGLang server imports; importing this does, in the fork server on a CPU (processes/fork_process.py)."""

from exprl_megatron.utils.package_names import install_fast_lookup

install_fast_lookup()

# The plugin has its hooks in place before SGLang's other modules come, as in keyed_server.
from sglang.srt.plugins import load_plugins  # noqa: E402

load_plugins()

import sglang.launch_server  # noqa: E402
import sglang.srt.entrypoints.http_server  # noqa: E402
import sglang.srt.managers.detokenizer_manager  # noqa: E402
import sglang.srt.managers.scheduler  # noqa: E402
import sglang.srt.model_executor.model_runner  # noqa: E402, F401
