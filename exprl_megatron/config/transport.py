"""The transport that pushes the weights of a run to its servers, also where the config leaves the choice open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from exprl_megatron.config.run import RunConfig

TransportKind = Literal["broadcast", "direct", "handles", "disk", "delta"]
_LOADER_ARGUMENT = "--custom-weight-loader"


@dataclass(frozen=True)
class TransportChoice:
    """How weights travel to one kind of server."""

    kind: TransportKind
    reason: str
    """Part of a sentence: `kind` is used because of this."""
    fallback: Literal["broadcast"] | None = None
    """The transport that is used from the moment on when a server refuses `kind`."""


def choose_transport(config: RunConfig, servers: Literal["policy", "ref"] = "policy") -> TransportChoice:
    """Return the transport to the sampling servers (`policy`), or to the server that scores the reference policy
    (`ref`).

    `sync.transport` where it names one. `auto` is `handles` where trainer and server share GPUs, `broadcast` where
    `direct` is known not to work, and else `direct`, with `broadcast` for servers that refuse it.
    """
    kind = config.sync.transport
    if kind != "auto":
        return TransportChoice(kind, "the config names it")
    if config.placement.kind == "colocated" and servers == "policy":
        return TransportChoice("handles", "trainer and servers share GPUs, which cannot be in one NCCL group twice")
    if config.sync.fp8:
        return TransportChoice("broadcast", "sync.fp8 sends other bytes than the trainer holds")
    if _LOADER_ARGUMENT in config.server.extra_options:
        return TransportChoice("broadcast", f"server.extra_args gives servers another {_LOADER_ARGUMENT}")
    return TransportChoice(
        "direct",
        "servers that exprl starts can receive shards; if one cannot, all get broadcasts",
        fallback="broadcast",
    )
