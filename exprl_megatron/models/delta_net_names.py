"""Names, shapes and sharding of a gated delta net layer's tensors, without norm before it and MLP behind it."""

from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.models.rules import Row, Rule, Stacked

DECAY = ".linear_attn.A_log"
"""End of the name of the logarithm of each head's decay rate: fp32, whatever the rest of the model is in."""
_INPUT = tuple(f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))


def delta_net_rows(net: DeltaNet) -> list[Row]:
    """Return the table's rows of one layer, in the order of export."""
    qkv = (net.keys, net.keys, net.values)
    projection = Stacked(rows=(qkv, (net.values,), (net.value_heads,), (net.value_heads,)))
    by_head = Rule(split_dim=0)
    return [
        ("self_attention.in_proj.layer_norm_weight", ("input_layernorm.weight",), Rule(), None),
        ("self_attention.in_proj.weight", _INPUT, projection, None),
        ("self_attention.conv1d.weight", ("linear_attn.conv1d.weight",), Stacked(rows=(qkv,)), None),
        ("self_attention.dt_bias", ("linear_attn.dt_bias",), by_head, None),
        ("self_attention.A_log", (DECAY.removeprefix("."),), by_head, None),
        ("self_attention.out_norm.weight", ("linear_attn.norm.weight",), Rule(), None),
        ("self_attention.out_proj.weight", ("linear_attn.out_proj.weight",), Rule(split_dim=1), None),
    ]


def delta_net_shapes(net: DeltaNet, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the Hugging Face tensors."""
    widths = (net.convolved, net.values, net.value_heads, net.value_heads)
    return {name: (width, hidden) for name, width in zip(_INPUT, widths, strict=True)} | {
        "linear_attn.conv1d.weight": (net.convolved, 1, net.kernel),
        "linear_attn.dt_bias": (net.value_heads,),
        DECAY.removeprefix("."): (net.value_heads,),
        "linear_attn.norm.weight": (net.value_dim,),
        "linear_attn.out_proj.weight": (hidden, net.values),
    }
