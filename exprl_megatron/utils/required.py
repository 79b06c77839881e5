"""Values that do not exist on every rank, or not at every time, where the caller knows that they do."""


def required[T](value: T | None, what: str) -> T:
    """Return `value`, which is not None here: for example a part of a run that only rank 0 has.

    Raises:
        RuntimeError: it is None; the message names it as `what`.
    """
    if value is None:
        raise RuntimeError(f"{what} does not exist on this rank, or not at this time")
    return value
