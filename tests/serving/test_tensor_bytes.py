"""Memory of tensors that other libraries read."""

import pytest
import torch

from exprl_megatron.serving.part_hash import hash_parts
from exprl_megatron.serving.tensor_bytes import tensor_bytes
from exprl_megatron.serving.transfer_tables import Slice
from exprl_megatron.serving.weight_hash import Sha256
from exprl_megatron.weight_sync.base_snapshot import DeltaWriter


class _Unwritten:
    """A mirror that has each tensor already as it is."""

    version = "v1"

    def __init__(self, tensor):
        self._tensor = tensor

    def read(self, name):
        return self._tensor.clone().view(torch.uint8).reshape(-1).numpy()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_they_are_those_that_numpy_sees(dtype):
    tensor = torch.randn(3, 5).to(dtype)
    assert bytes(tensor_bytes(tensor)) == tensor.clone().view(torch.uint8).numpy().tobytes()
    assert bytes(tensor_bytes(tensor[1])) == bytes(tensor_bytes(tensor))[tensor[0].nbytes :][: tensor[0].nbytes]
    assert bytes(tensor_bytes(tensor[:0])) == b""


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: bytes(tensor_bytes(tensor)),
        lambda tensor: hash_parts([(Slice(0, 0, 4, 0, 8), tensor)]),
        lambda tensor: hash_parts([(Slice(0, 0, 4, 0, 4), tensor[:, :4])]),
        lambda tensor: Sha256().update(tensor.view(torch.uint8)),
        lambda tensor: DeltaWriter(_Unwritten(tensor), None, "v2").add([("w", tensor)]),
    ],
    ids=["itself", "a part", "a part with gaps", "SGLang's hash", "a delta"],
)
def test_weights_that_were_read_can_still_leave_memory(read):
    """Where the trainer and its servers share memory, the storage of the weights is resized to nothing and back."""
    tensor = torch.randn(4, 8)
    read(tensor)
    tensor.untyped_storage().resize_(0)
    assert tensor.untyped_storage().nbytes() == 0
