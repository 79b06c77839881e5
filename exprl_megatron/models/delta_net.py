"""Sizes of gated delta net layers (arXiv 2412.06464), as Qwen3.5 has them in three of four layers."""

from dataclasses import dataclass

CHUNK = 64
"""Tokens that kernels, and this project's own rule, compute together."""


@dataclass(frozen=True)
class DeltaNet:
    """Layers that keep a state in place of keys and values: a matrix of `key_dim` x `value_dim` for each value head."""

    key_heads: int
    """Heads of query and key; each is used by `value_heads` / `key_heads` heads of value."""
    value_heads: int
    key_dim: int
    """Of a query's and a key's head."""
    value_dim: int
    """Of a value's head."""
    kernel: int
    """Tokens that the causal convolution over query, key and value sees."""

    @property
    def keys(self) -> int:
        """Width of all keys, which is that of all queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Width of all values, which is that of the output and of its gate."""
        return self.value_heads * self.value_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: query, key and value."""
        return 2 * self.keys + self.values

    @property
    def state_bytes(self) -> int:
        """Bytes that a server keeps for each request instead of keys and values: fp32 states, bf16 convolution."""
        return 4 * self.value_heads * self.key_dim * self.value_dim + 2 * (self.kernel - 1) * self.convolved

    @property
    def projected(self) -> int:
        """Width of the input projection: query, key, value, output gate, and two numbers for each value head."""
        return self.convolved + self.values + 2 * self.value_heads
