"""How long the parts of a weight sync took, and how much it moved."""

from dataclasses import dataclass

GB = 1e9


@dataclass
class SyncTimes:
    """Seconds as rank 0 saw them. Parts overlap: gathering continues while the bucket before is sent."""

    gather_s: float = 0.0
    """Joining shards into buckets, of all senders the longest."""
    quantise_s: float = 0.0
    """Rounding to FP8 blocks, of all senders the longest."""
    send_s: float = 0.0
    """From asking the servers to take a bucket until it was sent; where it goes by files, writing them."""
    load_s: float = 0.0
    """From then until the last server had put it into its model."""
    check_s: float = 0.0
    """After the last bucket: the servers' checksums, and what was left to do of the trainer's."""
    push_s: float = 0.0
    """From the first gather to the servers' last answer, without the check."""
    nbytes: int = 0
    """Of all tensors as they are sent, once, however many servers take them."""
    moved: int = 0
    """Bytes that crossed to a server or its disk, for each server alike."""

    def metrics(self) -> dict[str, float]:
        """As named numbers for the logs."""
        seconds = {
            f"sync/{part}": getattr(self, f"{part}_s") for part in ("gather", "quantise", "send", "load", "check")
        }
        return seconds | {
            "sync/seconds": self.push_s + self.check_s,
            "sync/gb": self.nbytes / GB,
            "sync/moved_gb": self.moved / GB,
            "sync/gb_per_s": self.nbytes / GB / self.push_s if self.push_s else 0.0,
        }
