"""Router replay: the trainer's routers take the experts that the sampling server chose (R3, arXiv 2510.11370).

The weights of the experts are computed from the trainer's own router, so that gradients reach it. Megatron-Core keeps
all routers of a process in one list, where those of a model that no longer exists would stay: ours are found in the
chunks themselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import unwrap_model


def forget_routers() -> None:
    """Empty Megatron's list of the process's routers, which would keep the models of former stages in memory."""
    RouterReplay.clear_global_router_replay_instances()


def layer_routers(chunk: torch.nn.Module) -> list[tuple[int, RouterReplay]]:
    """Return (the layer, counted from 0 over the whole model; what its router replays) for each mixture in `chunk`."""
    routers = [
        (layer.layer_number - 1, getattr(layer.mlp, "router", None)) for layer in unwrap_model(chunk).decoder.layers
    ]
    return [(layer, router.router_replay) for layer, router in routers if router is not None]


class Replay:
    """The routers of this rank's chunks in one pass over micro-batches, all of which replay.

    With `recomputes` layers run again in the backward pass. That takes a chunk's micro-batches in the order in which
    they went forward, while the pipeline has taken others in between: each recomputation takes the oldest choice.
    """

    def __init__(self, model: Sequence[torch.nn.Module], recomputes: bool):
        of_chunks = {chunk: layer_routers(chunk) for chunk in model}
        layers = sorted(layer for routers in of_chunks.values() for layer, _ in routers)
        self._routers = {
            chunk: [(layers.index(layer), router) for layer, router in routers] for chunk, routers in of_chunks.items()
        }
        self._recomputes = recomputes

    @contextmanager
    def forward(self, chunk: torch.nn.Module, experts: torch.Tensor) -> Iterator[None]:
        """Make `chunk` compute one micro-batch with `experts` [tokens, layers of all chunks, top_k] inside the
        block.
        """
        for place, router in self._routers[chunk]:
            chosen = experts[:, place].long()
            if self._recomputes:
                router.set_target_indices(chosen)
            else:
                router.target_topk_idx = chosen
            router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        yield
        for _, router in self._routers[chunk]:
            router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def end(self) -> None:
        """Stop the replay: the routers choose experts again."""
        for routers in self._routers.values():
            for _, router in routers:
                router.clear_indices()
                router.clear_router_replay_action()
