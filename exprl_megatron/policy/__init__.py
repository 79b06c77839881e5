"""The Megatron side: layout, architecture, model, step, checkpoint.

Importing this package costs nothing, but it sees to it that `megatron.core`, whenever and by whomever it
is imported later, finds a machine without CUDA prepared (see cpu_platform).
"""

import importlib.abc
import sys


class _BeforeMegatron(importlib.abc.MetaPathFinder):
    """Runs cpu_platform.install() at the moment of the first import of megatron.core."""

    def find_spec(self, name, path, target=None):
        if name == "megatron.core":
            sys.meta_path.remove(self)
            _prepare()
        return None


def _prepare() -> None:
    from exprl_megatron.policy import cpu_platform

    cpu_platform.install()


if "megatron.core" in sys.modules:
    _prepare()
else:
    sys.meta_path.insert(0, _BeforeMegatron())
