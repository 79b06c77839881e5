"""How many parameters each pipeline rank holds, by the table of names: exactly what Megatron builds there."""

from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from math import prod

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture, padded_vocabulary, stage_layers
from exprl_megatron.models.name_map import hf_shapes, parameters


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of one rank. Ranks of one pipeline stage hold equally many."""

    dense: int = 0
    """All but the experts."""
    experts: int = 0
    linear: int = 0
    """Those of `dense` that lie in the layers' linear products, which FP8 computes."""

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.experts

    def __add__(self, other: "ParameterCounts") -> "ParameterCounts":
        return ParameterCounts(self.dense + other.dense, self.experts + other.experts, self.linear + other.linear)

    def __mul__(self, times: int) -> "ParameterCounts":
        return ParameterCounts(self.dense * times, self.experts * times, self.linear * times)


def rank_counts(architecture: Architecture, layout: Layout, pp_rank: int) -> ParameterCounts:
    """Return the parameters of each rank in pipeline stage `pp_rank`; the layout must fit the architecture."""
    found = _ends(architecture, layout, pp_rank)
    for kind, count in architecture.kinds(chain(*stage_layers(architecture, layout)[pp_rank])).items():
        found += layer_counts(kind, layout) * count
    return found


def layer_counts(architecture: Architecture, layout: Layout) -> ParameterCounts:
    """Return a rank's parameters of one layer, one of those of a model whose layers are all alike."""
    whole, cut, matrices, experts = _layer(architecture)
    linear = matrices // layout.tp
    return ParameterCounts(whole + cut // layout.tp + linear, experts // (layout.ep * layout.etp), linear)


def model_parameters(architecture: Architecture) -> int:
    """Return the parameters of the whole model in Hugging Face form."""
    layers = sum(count * sum(_layer(kind)) for kind, count in architecture.kinds().items())
    vocabulary = architecture.vocabulary * architecture.hidden * (1 if architecture.tied else 2)
    return layers + vocabulary + architecture.hidden


def largest_tensor(architecture: Architecture) -> int:
    """Return the elements of the largest tensor in Hugging Face form."""
    mlps = [width for kind in architecture.kinds() for width in _mlp_widths(kind)]
    return architecture.hidden * max(architecture.vocabulary, *mlps, architecture.heads * architecture.head_dim)


def _mlp_widths(architecture: Architecture) -> list[int]:
    """Return the widths of a layer's MLP, or of each of its experts and of the shared one."""
    experts = architecture.experts
    return [architecture.ffn] if experts is None else [experts.ffn, experts.shared_ffn]


def _ends(architecture: Architecture, layout: Layout, pp_rank: int) -> ParameterCounts:
    """Return the embedding, final norm and output layer (or the last stage's copy of a tied embedding)."""
    vocabulary = padded_vocabulary(architecture, layout.tp) // layout.tp * architecture.hidden
    count = vocabulary if pp_rank == 0 else 0
    if pp_rank == layout.pp - 1:
        count += architecture.hidden
        count += vocabulary if layout.pp > 1 or not architecture.tied else 0
    return ParameterCounts(dense=count)


@cache
def _layer(architecture: Architecture) -> tuple[int, int, int, int]:
    """Return one layer's elements: (whole on every rank, cut over tp and no matrix, matrices cut over tp, experts)."""
    one = replace(architecture, layers=1)
    shapes = hf_shapes(one)
    whole = cut = matrices = experts = 0
    for entry in parameters(one, Layout()):
        if not entry.name.startswith("decoder.layers.") or entry.is_buffer:
            continue
        sizes = [shapes[name] for name in entry.hf_names]
        count = sum(map(prod, sizes))
        if entry.ep_rank is not None:
            experts += count
        elif entry.rule.split_dim is None:
            whole += count
        elif len(sizes[0]) != 2:
            cut += count
        else:
            matrices += count
    return whole, cut, matrices, experts
