"""Which allocator pyarrow uses."""

import os

import pyarrow as pa


def allocate_by_malloc() -> None:
    """Let pyarrow allocate by malloc in this process from now on, unless the user selected an allocator.

    Its default requests huge pages and gives them back early. In a virtual machine whose host must provide them, the
    kernel takes longer to fill those than the rest of reading a step takes, and may when one is written.
    """
    if "ARROW_DEFAULT_MEMORY_POOL" not in os.environ:
        pa.set_memory_pool(pa.system_memory_pool())
