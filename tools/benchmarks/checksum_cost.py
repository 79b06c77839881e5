"""What checksums add to a weight sync: syncs without them, with them, and with SGLang's own, in turns."""

import time
from pathlib import Path
from statistics import median

from benchmarks.sync_runs import Trainer
from exprl_megatron.config.policy import Layout
from exprl_megatron.processes.descendants import descendants, existing

KINDS = ("none", "shards", "whole")
"""No checksums; those of shards and of the served model's parts of them; SGLang's own, of joined tensors."""
_SELDOM = 3
"""What takes several times as long is measured once in this number of rounds."""


def measure_checksums(
    layout: Layout, model: Path, servers: list[dict], server_tp: int, settings: dict
) -> dict[str, dict[str, float]] | None:
    """Of each kind the median seconds of a sync: by the clock, and of all processes of both sides; on rank 0."""
    trainer = Trainer(layout, model, servers, server_tp, settings)
    syncs = {kind: trainer.sync(verify=kind != "none") for kind in KINDS}
    taken: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    for number in range(settings["repeats"] + 1):
        for kind, sync in syncs.items():
            if kind == "whole" and number > 1 and number % _SELDOM != 1:
                continue
            trainer.change()
            if kind == "whole":
                sync._have_loader = False
            before = _processor_s(trainer, servers)
            started = time.monotonic()
            sync.push_weights(f"{layout}-{kind}-{time.monotonic_ns()}")
            wall_s = time.monotonic() - started
            # The first opens the groups.
            if number:
                taken[kind].append((wall_s, _processor_s(trainer, servers) - before))
    trainer.close(syncs["none"])
    if trainer.world.rank != 0:
        return None
    return {
        kind: {"wall_s": median(wall for wall, _ in each), "cpu_s": median(cpu for _, cpu in each)}
        for kind, each in taken.items()
    }


def _processor_s(trainer: Trainer, servers: list[dict]) -> float:
    """Return processor seconds of all processes of both sides until now, on rank 0; a collective."""
    own = trainer.coordinator.collect(time.process_time())
    if own is None:
        return 0.0
    processes = existing(pid for server in servers for pid in descendants(server["pid"]))
    return sum(own) + sum(sum(process.cpu_times()[:2]) for process in processes)
