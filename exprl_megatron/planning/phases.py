"""A phase of a step on one kind of device: what it holds, how long it works, how fast that is."""

from dataclasses import dataclass

from exprl_megatron.planning.memory import Memory


@dataclass(frozen=True)
class Speed:
    """Tokens per second and device, and the share of a peak."""

    tokens_per_s_per_gpu: float
    mfu: float
    peak: str
    """The peak that `mfu` is a share of."""


@dataclass(frozen=True)
class Phase:
    """One phase of a step on one kind of device."""

    name: str
    device: str
    """trainer, policy server, judge server or ref server."""
    seconds: float
    """That it adds to a step."""
    memory: Memory
    """On the fullest such device."""
    speed: Speed | None = None
    """None where nothing is computed."""
    busy_s: float | None = None
    """For which the devices work, where that is more than `seconds` because other phases run at the same time."""


def speed_of(tokens: float, flops: float, seconds: float, gpus: int, peak: tuple[str, float]) -> Speed:
    """Return the speed of `gpus` that need `seconds` for `tokens` tokens, which take `flops` operations of the
    model.
    """
    name, rate = peak
    return Speed(tokens / seconds / gpus, flops / seconds / gpus / rate, name)
