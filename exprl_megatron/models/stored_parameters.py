"""Where Megatron's torch_dist files keep each parameter of the table of names.

The files know no layout. A parameter of the decoder's layers is in one tensor with those of all other layers,
[layers, ...], one of an expert in one with all experts of all layers, [layers, experts, ...]; where layers' tensors
differ, each layer has tensors of its own, without the first dimension. What tensor parallelism cuts is put together
again: what a single rank would hold. Only an embedding or output layer keeps the rows that padded it in the layout
that wrote it.
"""

import re
from dataclasses import dataclass, replace

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.architecture import Architecture
from exprl_megatron.models.name_map import Parameter, hf_shapes, layers_are_alike, parameters
from exprl_megatron.models.rules import GateUp, Stacked, Vocabulary

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_SECTIONS = ("query", "key", "value", "z", "beta", "alpha")
"""Megatron's names for the sections of a gated delta net's matrices, in order (gdn.py); a convolution has three."""
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class StoredParameter:
    """The location of one parameter: `key` names the tensor, `index` (layer, then expert) the part of it."""

    parameter: Parameter
    key: str
    index: tuple[int, ...]
    counts: tuple[int, ...]
    """Sizes of the dimensions that `index` selects in."""
    shape: tuple[int, ...]
    """Of the parameter itself; vocabularies without padding."""

    @property
    def padded(self) -> bool:
        """Whether more rows may follow."""
        return isinstance(self.parameter.rule, Vocabulary)

    @property
    def pieces(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Offset and shape, within the parameter, of what is written on its own: gate and up, or all of it."""
        origin = (0,) * len(self.shape)
        if not isinstance(self.parameter.rule, GateUp):
            return [(origin, self.shape)]
        half = (self.shape[0] // 2, *self.shape[1:])
        return [(origin, half), ((half[0], *origin[1:]), half)]

    @property
    def tensors(self) -> list["StoredParameter"]:
        """Return what is written under a key of its own: all of it, or each section of a gated delta net's matrices."""
        rule = self.parameter.rule
        if not isinstance(rule, Stacked):
            return [self]
        rows = [size for sections in rule.rows for size in sections]
        return [
            replace(self, key=f"{self.key}.{name}", shape=(size, *self.shape[1:]))
            for name, size in zip(_SECTIONS, rows, strict=False)
        ]


def stored_parameters(architecture: Architecture) -> list[StoredParameter]:
    """Return the location of every parameter, in the order of the name map."""
    shapes = hf_shapes(architecture)
    alike = layers_are_alike(architecture)
    return [_stored(parameter, shapes, architecture, alike) for parameter in parameters(architecture, Layout())]


def _stored(
    parameter: Parameter, shapes: dict[str, tuple[int, ...]], architecture: Architecture, alike: bool
) -> StoredParameter:
    parts = [shapes[name] for name in parameter.hf_names]
    shape = (sum(part[0] for part in parts), *parts[0][1:])
    key = parameter.name
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    if layer := _LAYER.fullmatch(key):
        prefix = "decoder.layers."
        if not alike:
            prefix += f"{layer[1]}."
        else:
            index, counts = (int(layer[1]),), (architecture.layers,)
        key = prefix + layer[2]
        if architecture.experts is not None and (expert := _EXPERT.fullmatch(layer[2])):
            key = f"{prefix}mlp.experts.experts.{expert[2]}"
            index, counts = (*index, int(expert[1])), (*counts, architecture.experts.count)
    return StoredParameter(parameter, key, index, counts, shape)
