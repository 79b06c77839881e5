"""What a loader's copies tell; that real servers are filled by it is shown in tests/weight_sync/test_transports.py."""

import pytest
import torch

from exprl_megatron.serving.loader_commands import RequiredSlice
from exprl_megatron.serving.loader_trace import trace

SHAPES = {"q": (4, 3), "k": (2, 3), "down": (3, 8), "norm": (3,), "words": (5, 3)}


class Model(torch.nn.Module):
    """The second of two ranks, in the ways of SGLang's layers: q above k, down by columns, words padded."""

    def __init__(self, load=None):
        super().__init__()
        self.qk = torch.nn.Parameter(torch.full((3, 3), 7.0))
        self.down = torch.nn.Parameter(torch.full((3, 4), 7.0))
        self.norm = torch.nn.Parameter(torch.full((3,), 7.0))
        self.words = torch.nn.Parameter(torch.full((4, 3), 7.0))
        self.load_one = load or self.load_one

    def load_weights(self, tensors):
        for name, tensor in tensors:
            self.load_one(name, tensor)

    def load_one(self, name, tensor):
        if name == "q":
            self.qk.data.narrow(0, 0, 2).copy_(tensor.narrow(0, 2, 2))
        elif name == "k":
            self.qk.data[2:].copy_(tensor.chunk(2)[1])
        elif name == "down":
            self.down.data.copy_(tensor[:, 4:])
        elif name == "norm":
            self.norm.data.copy_(tensor)
        else:
            self.words.data[:1].copy_(tensor[4:])
            self.words.data[1:].fill_(0)


def test_every_copy_is_noted_and_none_is_done():
    model = Model()
    places = trace(model, SHAPES, torch.float32)
    assert [place.need for place in places] == [
        RequiredSlice("q", 2, 2, 0, 3),
        RequiredSlice("k", 1, 1, 0, 3),
        RequiredSlice("down", 0, 3, 4, 4),
        RequiredSlice("norm", 0, 3, 0, 1),
        RequiredSlice("words", 4, 1, 0, 3),
    ]
    assert all((parameter == 7).all() for parameter in (model.qk, model.down, model.norm, model.words[:1]))


def test_places_are_filled_as_the_loader_fills_them():
    numbers = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    loaded, filled = Model(), Model()
    loaded.load_weights(numbers.items())
    # The parameters' memory may be another one by then.
    places = trace(filled, SHAPES, torch.float32)
    for parameter in filled.parameters():
        parameter.data = parameter.data.clone()
    for place in places:
        name, row, rows, column, columns = place.need
        whole = numbers[name].view(len(numbers[name]), -1)
        place.view(dict(filled.named_parameters())).copy_(whole[row : row + rows, column : column + columns])
    for parameter, expected in zip(filled.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, expected)


class Convolution(torch.nn.Module):
    """The second of two ranks' part of a gated delta net's convolution: of 4 queries, 4 keys and 6 values."""

    def __init__(self, width=5):
        super().__init__()
        self.conv = torch.nn.Parameter(torch.full((7, 1, width), 7.0))

    def load_weights(self, tensors):
        for _, tensor in tensors:
            for first, begin, count in ((0, 2, 2), (2, 6, 2), (4, 11, 3)):
                self.conv.data[first : first + count, ...].copy_(tensor[begin : begin + count])


def test_sections_of_a_tensor_of_three_dimensions_are_rectangles_of_its_rows():
    model, whole = Convolution(), torch.randn(14, 1, 5)
    places = trace(model, {"conv": (14, 1, 5)}, torch.float32)
    assert [place.need for place in places] == [
        RequiredSlice("conv", 2, 2, 0, 5), RequiredSlice("conv", 6, 2, 0, 5), RequiredSlice("conv", 11, 3, 0, 5)
    ]  # fmt: skip
    for place in places:
        need = place.need
        place.view(dict(model.named_parameters())).copy_(whole[need.row : need.row + need.rows, 0])
    assert torch.equal(model.conv, torch.cat([whole[2:4], whole[6:8], whole[11:]]))
    with pytest.raises(ValueError, match="conv does not go into a parameter"):
        trace(Convolution(width=4), {"conv": (14, 1, 5)}, torch.float32)


class WithBias(torch.nn.Module):
    """A router as SGLang has it in a model of bf16, and a layer of that model."""

    def __init__(self, bias=torch.float32):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.full((4, 3), 7.0))
        self.bias = torch.nn.Parameter(torch.full((8,), 7.0, dtype=bias))
        self.norm = torch.nn.Parameter(torch.full((3,), 7.0, dtype=torch.bfloat16))

    def load_weights(self, tensors):
        for name, tensor in tensors:
            parameter = getattr(self, name).data
            (parameter[2:6] if name == "bias" else parameter).copy_(tensor)


def test_a_vector_of_a_wider_dtype_is_sent_as_words_and_every_bit_arrives():
    shapes, model = {"gate": (4, 3), "bias": (4,), "norm": (3,)}, WithBias()
    places = trace(model, shapes, torch.bfloat16, {"bias": torch.float32})
    assert [place.need for place in places] == [
        RequiredSlice("gate", 0, 4, 0, 3),
        RequiredSlice("bias", 0, 8, 0, 1),
        RequiredSlice("norm", 0, 3, 0, 1),
    ]
    sent = torch.randn(4) * 1.0001
    views = [place.view(dict(model.named_parameters())) for place in places]
    assert [view.dtype for view in views] == [torch.float32, torch.bfloat16, torch.bfloat16]
    views[1].copy_(sent.view(torch.bfloat16).view(-1, 1))
    assert torch.equal(model.bias[2:6], sent)
    assert torch.equal(model.bias[[0, 1, 6, 7]], torch.full((4,), 7.0))


def test_a_vector_that_the_model_keeps_in_another_dtype_cannot_be_sent_as_words():
    with pytest.raises(ValueError, match=r"bias is a vector of torch\.float32, and the model keeps it otherwise"):
        trace(WithBias(torch.bfloat16), {"bias": (4,)}, torch.bfloat16, {"bias": torch.float32})


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda model, t: model.norm.data.copy_(t * 2), "a changed tensor does not go into a parameter"),
        (lambda model, t: torch.empty(3).copy_(t), "norm does not go into a parameter"),
        (lambda model, t: model.qk.data.copy_(t), "norm does not go into a parameter as it is"),
        (lambda model, t: model.norm.data[:2].copy_(t[::2]), "norm is not cut into rectangles"),
        (lambda model, t: model.norm.data.fill_(t[0].item()), "Model reads the numbers of its weights"),
        (lambda model, t: model.norm.data.add_(t), r"it computes aten\.add_"),
    ],
)
def test_a_loader_that_does_more_than_to_copy_is_refused(load, message):
    model = Model(lambda name, tensor: load(model, tensor))
    with pytest.raises(ValueError, match=message):
        trace(model, {"norm": (3,)}, torch.float32)
