"""Makes the transport that was chosen for a run."""

from collections.abc import Callable, Sequence
from pathlib import Path

from exprl_megatron.config.transport import TransportChoice
from exprl_megatron.policy.world import World
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.weight_sync.auto import AutoTransport
from exprl_megatron.weight_sync.broadcast import BroadcastTransport
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.delta import DeltaTransport
from exprl_megatron.weight_sync.direct import DirectTransport
from exprl_megatron.weight_sync.disk import DiskTransport
from exprl_megatron.weight_sync.handles import HandlesTransport
from exprl_megatron.weight_sync.transport import Transport

_BY_FILES = {"disk": DiskTransport, "delta": DeltaTransport}
_BY_MEMORY = {"broadcast": BroadcastTransport, "direct": DirectTransport, "handles": HandlesTransport}


def make_transport(
    choice: TransportChoice,
    clients: Sequence[SGLangClient],
    server_tp: int,
    world: World,
    coordinator: RankCoordinator,
    deadline_s: float,
    *,
    directory: Path,
    model: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> Transport:
    """The transport of `choice`.

    Those that go by files write into `directory`, in the form of the model in `model`. `tell` is given a line when the
    choice's fallback is used.

    More than 7 parameters: the sum of what the transports need, of which each takes a part.
    """
    kind = choice.kind
    if choice.fallback is not None:
        return AutoTransport(clients, server_tp, world, coordinator, deadline_s, tell=tell)
    if kind in _BY_FILES:
        return _BY_FILES[kind](clients, directory, model, coordinator, deadline_s)
    return _BY_MEMORY[kind](clients, server_tp, world, coordinator, deadline_s)
