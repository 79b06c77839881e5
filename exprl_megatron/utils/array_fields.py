"""Frozen dataclasses that hold numpy arrays, with equality, hash and pickle."""

from dataclasses import Field, fields, is_dataclass
from typing import Any

import numpy as np


class ArrayFields:
    """Base of a `@dataclass(frozen=True, eq=False)` with array fields, which its __post_init__ gives to `_hold`.

    Two are equal where all compared fields are, arrays bit for bit. The hash leaves arrays out. What is unpickled has
    gone through the constructor, so that its arrays are read-only again.
    """

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in _compared(self))

    def __hash__(self) -> int:
        values = (getattr(self, name) for name in _compared(self))
        return hash(tuple(value for value in values if not isinstance(value, np.ndarray)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, field.name) for field in _fields(self))

    def _hold(self, dtype: type, *names: str) -> None:
        """Make each named field that is not None a read-only array [n] of `dtype`; one of that type is not copied."""
        for name in names:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, read_only(value, dtype))


def read_only(values: Any, dtype: type) -> np.ndarray:
    """Return `values` as an array [n] of `dtype` that cannot be written to; shares the memory of one that has that
    type.

    Raises:
        ValueError: it has another number of dimensions.
    """
    array: np.ndarray = np.asarray(values, dtype=dtype).view()
    if array.ndim != 1:
        raise ValueError(f"an array of {array.ndim} dimensions where one dimension is expected")
    array.flags.writeable = False
    return array


def _compared(self: ArrayFields) -> list[str]:
    return [field.name for field in _fields(self) if field.compare]


def _fields(self: ArrayFields) -> tuple[Field, ...]:
    """Return the fields of the dataclass that derives from this base; TypeError where it is not one."""
    if not is_dataclass(self):
        raise TypeError(f"{type(self).__name__} is not a dataclass")
    return fields(self)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and a == b
