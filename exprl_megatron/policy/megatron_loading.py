"""Loads a converted directory's weights into a model of any layout."""

from collections.abc import Sequence
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject

from exprl_megatron.models.architecture import Architecture
from exprl_megatron.policy.megatron_files import MEGATRON, MegatronFiles
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.precision import set_parameter


def is_converted(directory: str | Path) -> bool:
    """Return whether the weights in `directory` are Megatron's files."""
    return (Path(directory) / MEGATRON).is_dir()


def load_converted(chunks: Sequence[torch.nn.Module], architecture: Architecture, directory: str | Path) -> None:
    """Fill this rank's parameters from `directory`; see load_files.

    Raises UserError where the files do not account for every parameter.
    """
    files = Path(directory) / MEGATRON
    MegatronFiles(files, architecture)
    load_files(chunks, files)


@torch.no_grad()
def load_files(chunks: Sequence[torch.nn.Module], files: Path) -> None:
    """Fill this rank's parameters from torch_dist files, reading only what they need; they keep their dtype.

    A collective, through Megatron's own loading.
    """
    # Extra states (FP8 scales of a run) are not part of a model.
    weights = {
        f"model{index}": {
            name: shard
            for name, shard in chunk.sharded_state_dict(metadata={"singleton_local_shards": False}).items()
            if not isinstance(shard, ShardedObject)
        }
        for index, chunk in enumerate(chunks)
    }
    loaded = dist_checkpointing.load(weights, str(files))
    for index, chunk in enumerate(chunks):
        for name, parameter in named_weights(chunk):
            set_parameter(parameter, loaded[f"model{index}"][name])
