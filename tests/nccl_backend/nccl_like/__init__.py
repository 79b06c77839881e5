"""A torch.distributed backend for tests: the behavior of NCCL between processes without a GPU, on top of gloo.

Every process that imports torch with this package's directory on its PYTHONPATH knows the backend: torch calls
`register` as the entry point of its group `torch.backends`. What it does as NCCL does:

* The first operation of a group connects it: it blocks the calling thread until every member has entered it, and has no
  timeout of its own. Sends and receives outside a batch connect each pair of ranks by itself.
* Operations run in the order of the calls, and every member makes the same calls in the same order. Another operation,
  number of elements or dtype is reported as an error on every member, where NCCL would hang or mix up memory.
* Two members on one device are refused. A device is the process, or what NCCL_LIKE_DEVICE names.
* Destroying a group waits for operations in flight, and for the other members; `abort` frees it.
* A member that aborts is not noticed: the others wait until their timeout or until they abort.
* Objects (pickles) that are sent over a group are recorded, with the place in the code that sent them.

NCCL_LIKE_RECORDS names a directory in which all processes keep what they record. NCCL_LIKE_PATIENCE_S bounds how long a
process blocks without a timeout: then it records who is missing and where it waits, and raises. Without it, it blocks
for ever.
"""

NAME = "nccl_like"


def register() -> None:
    """Make the backend known to torch.distributed in this process."""
    # Here, as torch itself calls this at the end of its import.
    import torch.distributed as dist

    from nccl_like.group import NcclLikeGroup
    from nccl_like.records import watch_objects

    if NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, NcclLikeGroup, devices=["cpu"])
    watch_objects(lambda group: isinstance(group, NcclLikeGroup))
