"""Which ranks hold a parameter's shards, and in what shape: arithmetic on the table of names."""

import math
from collections.abc import Callable, Iterable

from exprl_megatron.config.policy import Layout
from exprl_megatron.models.name_map import Parameter, dtype_of

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
Shape = tuple[int, ...]


def shapes_in_words(shapes: dict[str, Shape], dtype: str) -> dict[str, Shape]:
    """Return `shapes` where every tensor's memory is seen as numbers of `dtype`: vectors that are kept in fp32 are
    longer.
    """
    found = {}
    for name, shape in shapes.items():
        words = ITEMSIZE[dtype_of(name, dtype)] // ITEMSIZE[dtype]
        found[name] = shape if words == 1 else (words * shape[0],)
    return found


def split_into_buckets(
    table: Iterable[Parameter], bytes_of: Callable[[Parameter], int], bucket_bytes: int
) -> list[list[Parameter]]:
    """Return the parameters in order, cut into buckets of at most `bucket_bytes` (more where one alone has more)."""
    cuts: list[list[Parameter]] = []
    filled = 0
    for parameter in table:
        size = bytes_of(parameter)
        if not cuts or filled + size > bucket_bytes:
            cuts.append([])
            filled = 0
        cuts[-1].append(parameter)
        filled += size
    return cuts


def holders(parameter: Parameter, layout: Layout) -> tuple[int, ...]:
    """Return the trainer's ranks that have the parameter's shards, in the shards' order; of several copies the first.

    Ranks are laid out as Megatron does: tp innermost, then cp, dp, pp; experts' etp innermost, then ep.
    """
    first = sender(parameter.pp_rank, layout)
    if parameter.ep_rank is not None:
        first += parameter.ep_rank * layout.etp
        return tuple(range(first, first + layout.etp))
    return tuple(range(first, first + (layout.tp if parameter.rule.split_dim is not None else 1)))


def copies(parameter: Parameter, holder: int, layout: Layout) -> range:
    """Return the ranks that have the same shard as `holder`, one of `holders`: its data- and context-parallel
    copies.
    """
    first = sender(parameter.pp_rank, layout)
    step = layout.tp if parameter.ep_rank is None else layout.etp * layout.ep
    return range(holder, first + layout.tp * layout.cp * layout.dp, step)


def sender(stage: int, layout: Layout) -> int:
    """Return the first rank of a pipeline stage, which sends the stage's messages."""
    return stage * layout.tp * layout.cp * layout.dp


def shard_shape(parameter: Parameter, shapes: dict[str, Shape], layout: Layout) -> Shape:
    """Return the parameter's shape on one of its holders; `shapes` are those of the whole Hugging Face tensors."""
    whole = [shapes[name] for name in parameter.hf_names]
    dim = parameter.rule.split_dim
    if dim is None:
        return whole[0]
    cut = math.ceil(sum(shape[dim] for shape in whole) / len(holders(parameter, layout)))
    return (*whole[0][:dim], cut, *whole[0][dim + 1 :])


def is_contiguous_shard(parameter: Parameter, shapes: dict[str, Shape], layout: Layout, index: int) -> bool:
    """Return whether the `index`-th shard is one piece of its only Hugging Face tensor: it needs no second buffer."""
    dim = parameter.rule.split_dim
    if len(parameter.hf_names) > 1 or dim not in (None, 0) or len(parameter.rule.sections(0)) > 1:
        return False
    rows = shard_shape(parameter, shapes, layout)[0]
    return dim is None or (index + 1) * rows <= shapes[parameter.hf_names[0]][0]
