"""The experts that a mixture's routers choose for each token: shape and dtype of this choice (router replay)."""

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Self

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import Architecture, read_architecture, stage_layers

if TYPE_CHECKING:
    import numpy as np

_NARROW = 256
"""Largest number of experts whose ids have one byte."""


@dataclass(frozen=True)
class Routing:
    """The shape of the experts that a model's routers choose for one token: [layers, top_k] of `experts`."""

    layers: int
    """All of the model's."""
    top_k: int
    experts: int
    dense_layers: int = 0
    """Of these the first ones, which have no experts and so any ids."""

    @classmethod
    def of(cls, architecture: Architecture) -> Self | None:
        """Return the routing of `architecture`; None for a dense model."""
        experts = architecture.experts
        if experts is None:
            return None
        return cls(architecture.layers, experts.top_k, experts.count, experts.dense_layers)

    def layers_of_stages(self, architecture: Architecture, layout: Layout) -> list[tuple[int, ...]]:
        """Return for each pipeline rank its layers with experts, counted from 0 over the whole model, in order."""
        return [
            tuple(layer for layer in sorted(chain.from_iterable(chunks)) if layer >= self.dense_layers)
            for chunks in stage_layers(architecture, layout)
        ]

    @property
    def dtype(self) -> "np.dtype":
        """The dtype of stored expert ids: uint8 where it is large enough, else int16."""
        # The launcher imports this module and no library that computes.
        import numpy as np

        return np.dtype(np.uint8 if self.experts <= _NARROW else np.int16)

    @property
    def token_bytes(self) -> int:
        """Bytes of the experts of one token."""
        return self.layers * self.top_k * self.dtype.itemsize


def with_router_replay(config: RunConfig) -> RunConfig:
    """Return `config` with `policy.router_replay: null` replaced: on where the model has experts and its servers return
    them.

    The same where the model cannot be read here, which the checks of a start say. sglang-router forwards no request for
    experts: what it does not know of a request it leaves out.
    """
    if config.policy.router_replay is not None:
        return config
    try:
        mixture = Routing.of(read_architecture(config.policy.model)) is not None
    except UserError:
        return config
    policy = config.policy.model_copy(update={"router_replay": mixture and not config.server.router})
    return config.model_copy(update={"policy": policy})


def replay_violations(config: RunConfig, architecture: Architecture) -> list[str]:
    """Return the sentence for the user where the routers of `architecture` cannot replay what the servers chose."""
    if not config.policy.router_replay:
        return []
    if Routing.of(architecture) is None:
        return [
            f"policy.router_replay is true, but {config.policy.model} has no experts; set it to false, or leave it out."
        ]
    if config.server.router and config.needs_sampling_servers:
        return [
            "policy.router_replay is true, but sglang-router (server.router) forwards no request for the experts that "
            "a server chose; set one of them to false."
        ]
    return []
