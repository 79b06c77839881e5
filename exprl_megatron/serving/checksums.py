"""The checksums that an SGLang server reports, computed from Hugging Face-named tensors.

SGLang 0.5.23 hashes each parameter as each tensor-parallel rank holds it (see sharding.py): its parts of the query, key
and value projections joined along the rows, of the gate and up projections too, those of all experts of a layer one
behind the other. FP8 weights are hashed as the bf16 numbers that they stand for.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from exprl_megatron.models.delta_net import DeltaNet
from exprl_megatron.serving.sharding import Device, rank_cut, sections
from exprl_megatron.serving.weight_hash import Sha256, WeightHash, WordHash
from exprl_megatron.serving.weight_layout import EXPERT_PARTS, FUSED, ServerPart, plus_one, served_dtype, server_part


@dataclass
class _Experts:
    """A parameter that the experts of a layer make up, expert by expert."""

    hashes: list[WeightHash]
    """For each tensor-parallel rank."""
    count: int
    """Of its parts, over all experts."""
    done: int = 0
    early: dict[int, torch.Tensor] = field(default_factory=dict)
    """Parts, by their place, that came before those ahead of them."""


class ServerChecksums:
    """Computes what `SGLangClient.checksums` returns for a server that holds the added weights.

    Tensors may come in any order, on any device; parts of a fused parameter are kept until it is complete, and those
    of experts until all ahead of them are there. `kv_heads`: the model's. `experts`: in a layer; `sigmoid_router`: see
    served_dtype; `delta_net`: the model's. `tied`: the model has tie_word_embeddings, so that an `lm_head.weight` is
    left out.
    """

    def __init__(
        self,
        *,
        tp: int = 1,
        kv_heads: int = 1,
        experts: int = 0,
        sigmoid_router: bool = False,
        tied: bool,
        server: Device = "cpu",
        delta_net: DeltaNet | None = None,
    ):
        self._tp, self._kv_heads, self._experts, self._sigmoid_router = tp, kv_heads, experts, sigmoid_router
        self._tied, self._server, self._delta_net = tied, server, delta_net
        self._found: tuple[dict[str, str], ...] = tuple({} for _ in range(tp))
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}
        self._growing: dict[str, _Experts] = {}

    def add(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Hash whole Hugging Face tensors, of any dtype; the caller may reuse their memory when this returns."""
        for name, tensor in named_tensors:
            tensor = _in_dtype(name, tensor.detach(), tensor.dtype, self._sigmoid_router)
            part = server_part(name, self._delta_net)
            if part.is_expert:
                self._add_expert(part, tensor)
            elif not (self._tied and name == "lm_head.weight"):
                self._add_dense(part, tensor)
            if copy := plus_one(name, self._delta_net):
                self._add_dense(ServerPart(copy, part.module, 0), tensor + 1)
        for parts in self._waiting.values():
            parts |= {name: kept.clone() for name, kept in parts.items()}
        for growing in self._growing.values():
            growing.early |= {place: kept.clone() for place, kept in growing.early.items()}

    def result(self) -> tuple[dict[str, str], ...]:
        """Return the checksums of each rank's parameters.

        Raises:
            ValueError: a part of one never came.
        """
        missing = [f"{name} (has {', '.join(parts)})" for name, parts in self._waiting.items()]
        missing += [f"{name} (has {e.done} of {e.count} parts)" for name, e in self._growing.items()]
        if missing:
            raise ValueError(f"parts of fused parameters are missing: {'; '.join(missing)}")
        return self._found

    def _add_dense(self, part: ServerPart, tensor: torch.Tensor) -> None:
        name, parts = part.parameter, {part.module: tensor}
        fused = name.rpartition(".")[0].rpartition(".")[2]
        if fused in FUSED:
            parts = self._waiting.setdefault(name, {})
            parts[part.module] = tensor
            if len(parts) < len(FUSED[fused]):
                return
            parts = {p: self._waiting[name][p] for p in FUSED[fused]}
            del self._waiting[name]
        for rank, held in enumerate(self._found):
            own = [self._rank_bytes(p, whole, rank) for p, whole in parts.items()]
            digest = self._hash(sum(map(len, own)))
            for data in own:
                digest.update(data)
            held[name] = digest.hexdigest()

    def _add_expert(self, part: ServerPart, tensor: torch.Tensor) -> None:
        name = part.parameter
        parts = EXPERT_PARTS[name.rpartition(".")[2]]
        count = self._experts * len(parts)
        if name not in self._growing:
            nbytes = count * len(self._rank_bytes(part.module, tensor, 0))
            self._growing[name] = _Experts([self._hash(nbytes) for _ in range(self._tp)], count)
        growing = self._growing[name]
        growing.early[part.position] = tensor
        while growing.done in growing.early:
            tensor = growing.early.pop(growing.done)
            for rank, digest in enumerate(growing.hashes):
                digest.update(self._rank_bytes(parts[growing.done % len(parts)], tensor, rank))
            growing.done += 1
        if growing.done == count:
            for held, digest in zip(self._found, growing.hashes, strict=True):
                held[name] = digest.hexdigest()
            del self._growing[name]

    def _hash(self, nbytes: int) -> WeightHash:
        return Sha256() if self._server == "cpu" else WordHash(nbytes)

    def _rank_bytes(self, part: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        held = [
            _rank_part(part, tensor.narrow(0, first, rows), rank, self._tp, self._kv_heads, self._server)
            for first, rows in sections(part, len(tensor), self._delta_net)
        ]
        return (held[0] if len(held) == 1 else torch.cat(held)).contiguous().reshape(-1).view(torch.uint8)


def rank_checksums(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tp: int,
    kv_heads: int,
    tied: bool,
    experts: int = 0,
    server: Device = "cpu",
    delta_net: DeltaNet | None = None,
) -> tuple[dict[str, str], ...]:
    """Return the ServerChecksums of whole Hugging Face tensors, of any dtype, by rank and parameter.

    Raises:
        ValueError: as ServerChecksums.result.
    """
    found = ServerChecksums(tp=tp, kv_heads=kv_heads, experts=experts, tied=tied, server=server, delta_net=delta_net)
    found.add(named_tensors)
    return found.result()


def checksums(
    named_tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    tied: bool,
    experts: int = 0,
    dtype: torch.dtype | None = None,
    server: Device = "cpu",
    delta_net: DeltaNet | None = None,
) -> dict[str, str]:
    """Return the checksums of whole Hugging Face tensors, of any dtype, for a server of one tensor-parallel rank."""
    served = ((name, _in_dtype(name, tensor, dtype or tensor.dtype, False)) for name, tensor in named_tensors)
    (found,) = rank_checksums(served, tp=1, kv_heads=1, tied=tied, experts=experts, server=server, delta_net=delta_net)
    return found


def _in_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype, sigmoid_router: bool) -> torch.Tensor:
    """Return `tensor` as a server keeps it whose model is in `dtype`."""
    return tensor.to(getattr(torch, served_dtype(name, str(dtype).removeprefix("torch."), sigmoid_router)))


def differing(held: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """Return the names, in order, whose checksums differ or which only one of the two has."""
    return sorted(name for name in held.keys() | expected.keys() if held.get(name) != expected.get(name))


def _rank_part(part: str, tensor: torch.Tensor, rank: int, tp: int, kv_heads: int, server: Device) -> torch.Tensor:
    cut = rank_cut(part, tuple(tensor.shape), rank, tp, kv_heads, server)
    if cut is None:
        return tensor
    held = tensor.narrow(cut.dim, cut.start, cut.count)
    padding = [*held.shape]
    padding[cut.dim] = cut.padding
    return torch.cat([held, held.new_zeros(padding)], cut.dim) if cut.padding else held
