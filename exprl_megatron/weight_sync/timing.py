"""Durations of the parts of a weight sync, and the bytes that it moved."""

from dataclasses import dataclass

GB = 1e9


@dataclass
class SyncTimes:
    """Seconds as seen by rank 0. Parts overlap: the next bucket is gathered while the previous one is sent."""

    gather_s: float = 0.0
    """Gathering shards into buckets; the maximum over senders."""
    quantize_s: float = 0.0
    """Quantizing to FP8 blocks; the maximum over senders."""
    send_s: float = 0.0
    """From the request that makes servers receive a bucket until it was sent; for transports through files, writing."""
    load_s: float = 0.0
    """From then until the last server had loaded it."""
    check_s: float = 0.0
    """After the last bucket: the servers' checksums, and the rest of the trainer's."""
    push_s: float = 0.0
    """From the first gather to the servers' last reply, without the check."""
    nbytes: int = 0
    """Bytes of all tensors as they are sent, counted once for any number of servers."""
    moved: int = 0
    """Bytes that one server received, over the network or from disk."""

    def metrics(self) -> dict[str, float]:
        """Return the metrics `sync/...` for the logs."""
        seconds = {
            f"sync/{part}": getattr(self, f"{part}_s") for part in ("gather", "quantize", "send", "load", "check")
        }
        return seconds | {
            "sync/seconds": self.push_s + self.check_s,
            "sync/gb": self.nbytes / GB,
            "sync/moved_gb": self.moved / GB,
            "sync/gb_per_s": self.nbytes / GB / self.push_s if self.push_s else 0.0,
        }
