"""The kinds of attention of a layer, as in config.json's `layer_types`."""

FULL = "full_attention"
"""A token sees all before it."""
SLIDING = "sliding_attention"
"""A token sees a window of those before it."""
LINEAR = "linear_attention"
"""A gated delta net in place of attention."""
