"""A value that must exist is returned, or named in an error."""

import pytest

from exprl_megatron.utils.required import required


def test_a_value_is_returned_even_if_it_is_falsy():
    assert required(0, "the count") == 0 and required("", "the text") == ""


def test_a_missing_value_is_named():
    with pytest.raises(RuntimeError, match="the pool does not exist on this rank"):
        required(None, "the pool")
