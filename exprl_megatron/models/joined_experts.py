"""Experts of a layer in one tensor, as published mixtures of Qwen3.5 have them, under the names of single experts.

`experts.gate_up_proj` is [experts, 2 x width, hidden], gate above up; `experts.down_proj` is [experts, hidden, width].
transformers writes a tensor for each expert instead, and reads both, as SGLang does for this family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exprl_megatron.models.architecture import Architecture

if TYPE_CHECKING:
    import torch

MARK = "experts-joined"
"""An empty file with which a directory with Megatron's files says that its model had joined experts."""
_JOINED = re.compile(r"(.+\.mlp\.experts)\.(gate_up_proj|down_proj)")
_SINGLE = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


@dataclass(frozen=True)
class Piece:
    """Where a single expert's matrix is: in the joined tensor `tensor` as number `expert`, rows [begin, end)."""

    tensor: str
    expert: int
    begin: int
    end: int


def may_be_joined(architecture: Architecture) -> bool:
    """Return whether both transformers and SGLang read joined experts of such a model."""
    return architecture.family == "qwen3.5-moe"


def is_joined(name: str, architecture: Architecture) -> bool:
    """Return whether the tensor `name` has all experts of a layer of such a model."""
    ours = may_be_joined(architecture) and name.startswith(f"{architecture.prefix}layers.")
    return ours and _JOINED.fullmatch(name) is not None


def pieces(names: Iterable[str], architecture: Architecture) -> dict[str, Piece]:
    """Return the single experts' matrices by name, where they are in the joined tensors of `names`."""
    found: dict[str, Piece] = {}
    for name in names:
        joined = _JOINED.fullmatch(name) if is_joined(name, architecture) else None
        if joined is None or architecture.experts is None:
            continue
        for part in ("down",) if joined[2] == "down_proj" else ("gate", "up"):
            begin, end = _rows(part, architecture)
            for expert in range(architecture.experts.count):
                found[f"{joined[1]}.{expert}.{part}_proj.weight"] = Piece(name, expert, begin, end)
    return found


def joined_shape(name: str, architecture: Architecture) -> tuple[int, ...]:
    """Return the shape of the joined tensor `name`.

    Raises:
        ValueError: the model has no experts.
    """
    experts = architecture.experts
    if experts is None:
        raise ValueError(f"{name} is of a model without experts")
    one = (architecture.hidden, experts.ffn) if name.endswith("down_proj") else (2 * experts.ffn, architecture.hidden)
    return (experts.count, *one)


def place_of(name: str, architecture: Architecture) -> Piece | None:
    """Return where the single expert's matrix `name` belongs; None for any other tensor."""
    single = _SINGLE.fullmatch(name)
    if single is None:
        return None
    kind = "down_proj" if single[3] == "down" else "gate_up_proj"
    return Piece(f"{single[1]}.{kind}", int(single[2]), *_rows(single[3], architecture))


class Joiner:
    """Joins experts' matrices that come one after another, in any order, each of them once."""

    def __init__(self, architecture: Architecture):
        self._architecture = architecture
        self._begun: dict[str, torch.Tensor] = {}
        self._missing: dict[str, int] = {}

    def add(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """Return `tensors` without single experts' matrices, and the joined ones that they complete."""
        complete = []
        for name, tensor in tensors:
            place = place_of(name, self._architecture)
            if place is None:
                complete.append((name, tensor))
            elif (whole := self._put(place, tensor)) is not None:
                complete.append((place.tensor, whole))
        return complete

    def _put(self, place: Piece, tensor: torch.Tensor) -> torch.Tensor | None:
        shape = joined_shape(place.tensor, self._architecture)
        if place.tensor not in self._begun:
            self._begun[place.tensor] = tensor.new_empty(shape)
            self._missing[place.tensor] = shape[0] * shape[1]
        self._begun[place.tensor][place.expert, place.begin : place.end] = tensor
        self._missing[place.tensor] -= place.end - place.begin
        return None if self._missing[place.tensor] else self._begun.pop(place.tensor)


def _rows(part: str, architecture: Architecture) -> tuple[int, int]:
    """Return the range of an expert's rows in a joined tensor that are its gate, up or down matrix."""
    width = architecture.experts.ffn if architecture.experts else 0
    return {"gate": (0, width), "up": (width, 2 * width), "down": (0, architecture.hidden)}[part]
