"""Trainer and sampling servers in turns on the same devices, and a ledger of what each phase leaves in memory.

To learn, the servers sleep: they give up their cache and their weights. To sample, the trainer's gradients and
optimizer leave the device, the servers' weights wake and get the new ones, the trainer's weights leave, and the
servers' cache wakes. Where the placement is separate nothing of this happens, and weights are brought as they are.
"""

from typing import Literal

import torch

from exprl_megatron.config.placement import PlacementConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.policy.offload import TRAINING, Offload
from exprl_megatron.policy.policy import Policy
from exprl_megatron.serving.fleet import Fleet
from exprl_megatron.weight_sync.conductor import Conductor
from exprl_megatron.weight_sync.sync import WeightSync

_GIB = 2**30


class Turns:
    """Every rank has one and calls the same methods; `fleet` is needed on rank 0 alone."""

    def __init__(
        self, config: PlacementConfig, policy: Policy, conductor: Conductor, fleet: Fleet | None, sync: WeightSync
    ):
        self._config = config
        self._conductor = conductor
        self._fleet = fleet
        self._sync = sync
        self._offload = Offload(policy)
        self._device = policy.world.device
        self._phase: Literal["learning", "sampling"] | None = None if config.kind == "colocated" else "learning"
        """None: nobody knows yet whether servers are awake."""
        self._ledger: dict[str, float] = {}

    def bring(self, version: str) -> dict[str, float]:
        """The servers' turn, under the policy's current weights as `version`; see WeightSync.bring.

        Raises RunStopped where the trainer leaves more on its device than the config allows.
        """
        if self._config.kind == "separate":
            return self._sync.bring(version)
        self._offload.away(*TRAINING)
        # Servers may have come in the midst of their turn.
        self._offload.back("weights")
        self._wake("weights")
        metrics = self._sync.bring(version)
        self._offload.away("weights")
        self._note("sampling", sum(self._offload.held().values()) if self._device.type == "cpu" else _own_memory())
        self._wake("kv_cache")
        self._phase = "sampling"
        return metrics

    def learn(self) -> None:
        """The trainer's turn, if it is not; precedes whatever gives the trainer memory, as a stage's start does.

        Raises RunStopped where the servers leave more on a device than the config allows.
        """
        if self._phase == "learning":
            return
        slept = put_to_sleep(self._conductor, self._fleet)
        self._note("learning", _foreign_memory(self._device))
        self._ledger["memory/servers_slept"] = float(slept)
        self._offload.back("weights", *TRAINING)
        self._phase = "learning"

    def take_ledger(self) -> dict[str, float]:
        """What the phases since this was asked last left in memory, in GiB."""
        ledger, self._ledger = self._ledger, {}
        return ledger

    def _wake(self, tag: str) -> None:
        self._conductor.everywhere(lambda: self._conductor.run(self._fleet.wake(tag)))

    def _note(self, phase: str, asleep: int) -> None:
        """Keep what is on the device while `phase` begins; `asleep` bytes are of the side that sleeps then."""
        held = self._offload.held()
        self._ledger |= {f"memory/{phase}/{part}": size / _GIB for part, size in held.items()}
        self._ledger[f"memory/{phase}/asleep"] = asleep / _GIB
        bound = self._config.max_asleep_gb
        if bound is not None and asleep > bound * _GIB:
            whose = "the trainer" if phase == "sampling" else "the servers"
            raise RunStopped(
                f"{whose} left {asleep / _GIB:.2f} GiB on the device of trainer-{torch.distributed.get_rank()} for the "
                f"phase of {phase}, more than placement.max_asleep_gb ({bound:g}); raise it, or see what holds memory."
            )


def put_to_sleep(conductor: Conductor, fleet: Fleet | None) -> bool:
    """Let all sampling servers give up their memory, those that do so already excepted; whether they can.

    Every rank calls it; `fleet` is needed on rank 0 alone, and is None there too where a run has no such servers.
    """
    return conductor.everywhere(lambda: fleet is not None and conductor.run(fleet.sleep()))


def _own_memory() -> int:
    """Bytes that this process holds on its GPU, the allocator's reserve included."""
    return torch.cuda.memory_reserved()


def _foreign_memory(device: torch.device) -> int:
    """Bytes that other processes hold on this rank's GPU, CUDA contexts included; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
