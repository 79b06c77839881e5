"""Where a served model puts each part of each Hugging Face tensor, asked of its own loader.

SGLang's `load_weights` is called with tensors of the meta device, which have a shape and no numbers; every copy out of
one of them is noted in place of being done. So whatever a model fuses, cuts over its ranks or pads is known without
a table of its names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exprl_megatron.serving.loader_commands import RequiredSlice


@dataclass(frozen=True)
class ParameterView:
    """A part of a parameter, and what belongs there."""

    need: RequiredSlice
    parameter: str
    offset: int
    """Of its first number in the parameter's memory."""
    size: tuple[int, int]
    stride: tuple[int, int]
    words: torch.dtype | None = None
    """Where the parameter's memory is seen as numbers of another dtype: which. Offset, size and stride are of these."""

    def view(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return [rows, columns], of the parameter as it is now."""
        data = parameters[self.parameter].data
        seen = data if self.words is None else data.view(self.words)
        return torch.as_strided(seen, self.size, self.stride, self.offset)


def trace(
    model: torch.nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    others: Mapping[str, torch.dtype] | None = None,
) -> list[ParameterView]:
    """Return the places of all tensors of `shapes` in `model`, whose parameters stay as they are but for what is
    padding.

    `dtype` is what will be sent. Vectors of `others` have these wider dtypes, and their memory is sent as words of
    `dtype`.

    Raises:
        ValueError: the loader does more with a tensor than to copy parts of it into parameters, and where the model
            keeps one of `others` in another dtype.
    """
    kinds = others or {}
    tensors = {name: torch.empty(shape, dtype=kinds.get(name, dtype), device="meta") for name, shape in shapes.items()}
    noted = _Noted(model, tensors, dtype)
    try:
        with noted, torch.no_grad():
            model.load_weights(list(tensors.items()))
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{type(model).__name__} reads the numbers of its weights while it loads: {error}") from error
    return noted.places


class _Noted(TorchDispatchMode):
    """Records the copies from `tensors` into parameters of `model`; any other operation is executed."""

    def __init__(self, model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype):
        super().__init__()
        self._dtype = dtype
        self.places: list[ParameterView] = []
        self._tensors = tensors
        self._names = {tensor.untyped_storage()._cdata: name for name, tensor in tensors.items()}
        self._parameters = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in model.named_parameters()
            if parameter.numel()
        }

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.copy_.default and args[1].is_meta:
            if args[1].numel():
                self.places.append(self._place(*args[:2]))
            return args[0]
        meta = {leaf.is_meta for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        if len(meta) > 1:
            raise ValueError(f"it computes {function} of a weight and other numbers")
        return function(*args, **(kwargs or {}))

    def _place(self, into: torch.Tensor, part: torch.Tensor) -> ParameterView:
        name = self._names.get(part.untyped_storage()._cdata)
        parameter = None if into.is_meta else self._parameters.get(into.untyped_storage().data_ptr())
        if name is None or parameter is None or into.shape != part.shape:
            raise ValueError(f"{name or 'a changed tensor'} does not go into a parameter as it is")
        whole = self._tensors[name]
        if part.dim() > 2:
            into, part, whole = (_by_rows(name, tensor) for tensor in (into, part, whole))
        row, rows, column, columns = _rectangle(name, part, whole)
        stride = (into.stride(0), into.stride(1) if into.dim() == 2 else 1)
        place = ParameterView(
            RequiredSlice(name, row, rows, column, columns), parameter, into.storage_offset(), (rows, columns), stride
        )
        kind = self._tensors[name].dtype
        if kind == self._dtype:
            return place
        if into.dtype != kind or into.dim() != 1 or into.stride(0) != 1:
            raise ValueError(f"{name} is a vector of {kind}, and the model keeps it otherwise")
        return _in_words(place, kind.itemsize // self._dtype.itemsize, self._dtype)


def _in_words(place: ParameterView, count: int, words: torch.dtype) -> ParameterView:
    """Return a vector's place where each of its numbers is `count` words."""
    need = RequiredSlice(place.need.name, count * place.need.row, count * place.need.rows, 0, 1)
    return ParameterView(need, place.parameter, count * place.offset, (need.rows, 1), (1, 1), words)


def _by_rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return [rows, all other dimensions together]: a view, for which these are contiguous."""
    try:
        return tensor.view(len(tensor), -1)
    except RuntimeError as error:
        raise ValueError(f"{name} is not cut into rectangles") from error


def _rectangle(name: str, part: torch.Tensor, whole: torch.Tensor) -> tuple[int, int, int, int]:
    """Return the row, rows, column and columns of the `part` of `whole`."""
    width = whole.shape[1] if whole.dim() == 2 else 1
    columns = part.shape[1] if part.dim() == 2 else 1
    expected = (width, 1)[: part.dim()]
    straight = all(
        size == 1 or stride == e for size, stride, e in zip(part.shape, part.stride(), expected, strict=True)
    )
    if part.dim() != whole.dim() or part.dim() not in (1, 2) or not straight:
        raise ValueError(f"{name} is not cut into rectangles")
    row, column = divmod(part.storage_offset(), width)
    return row, part.shape[0], column, columns
