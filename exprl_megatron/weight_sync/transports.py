"""Creates the transport that was chosen for a run."""

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

_BY_FILES: dict[str, type[DiskTransport] | type[DeltaTransport]] = {"disk": DiskTransport, "delta": DeltaTransport}
_BY_MEMORY: dict[str, type[BroadcastTransport] | type[DirectTransport] | type[HandlesTransport]] = {
    "broadcast": BroadcastTransport,
    "direct": DirectTransport,
    "handles": HandlesTransport,
}


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
    log: Callable[[str], None] = lambda text: None,
) -> Transport:
    """Create the transport of `choice`.

    Transports through files write to `directory`, in the format of the model in `model`. `log` receives a line when the
    choice's fallback is used.

    More than 7 parameters: each transport needs some of them.
    """
    kind = choice.kind
    if choice.fallback is not None:
        return AutoTransport(clients, server_tp, world, coordinator, deadline_s, log=log)
    if kind in _BY_FILES:
        return _BY_FILES[kind](clients, directory, model, coordinator, deadline_s)
    return _BY_MEMORY[kind](clients, server_tp, world, coordinator, deadline_s)
