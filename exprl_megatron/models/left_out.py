"""Tensors of a model that a policy has no use for, such as those of multi-token prediction: they are copied through.

A model directory in Hugging Face form has them among its weights; one with Megatron's files in a file of their own.
"""

from pathlib import Path

from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.weight_readers import is_left_out, open_safetensors, weight_files

LEFT_OUT = "left-out.safetensors"
"""Where a directory with Megatron's files keeps them."""


def left_out_tensors(directory: str | Path, architecture: Architecture) -> dict[str, Path]:
    """Return the names of those that `directory` has, in order, and the file that each is in; a model may come without
    them.

    Raises UserError where a file is missing, truncated or damaged.
    """
    directory = Path(directory)
    if not architecture.left_out or not any(directory.glob("*.safetensors")):
        return {}
    own = directory / LEFT_OUT
    found = {}
    for path in [own] if own.is_file() else weight_files(directory):
        with open_safetensors(path) as file:
            found.update({name: path for name in file.keys() if is_left_out(name, architecture)})  # noqa: SIM118
    return dict(sorted(found.items()))
