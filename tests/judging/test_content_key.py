"""Keys by content."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exprl_megatron.judging.content_key import content_key, content_keys


def test_a_content_key_depends_on_content_alone():
    # echo -n '["judgement",{"model":"m","trace":"t"}]' | sha256sum
    expected = "d3e788bead39ceff712d45e2f8b60a8cba6e81116f683523b3f62b716119cd92"
    assert content_key("judgement", trace="t", model="m") == content_key("judgement", model="m", trace="t") == expected


def test_content_keys_differ_by_kind_name_type_and_value():
    parts = [{"a": 1}, {"a": 1.0}, {"a": True}, {"a": "1"}, {"a": None}, {"b": 1}, {"a": 1, "b": None}, {}]
    keys = {content_key(kind, **p) for kind in ("judgement", "rubric") for p in parts}
    keys |= {content_key("judgement", kind="x"), content_key("judgement", a="é"), content_key("judgement", a="e\u0301")}
    assert len(keys) == 2 * len(parts) + 3


def test_a_content_key_has_no_way_to_write_two_things_alike():
    with pytest.raises(TypeError, match="the part a of a content key is a list"):
        content_key("judgement", a=["x"])
    with pytest.raises(ValueError):
        content_key("judgement", a=float("nan"))


@given(
    st.lists(st.text(st.characters())),
    st.dictionaries(st.sampled_from(["a", "trace_", "unit", 'x"trace":""']), st.text() | st.none() | st.integers()),
    st.booleans(),
)
def test_the_keys_of_texts_that_continue_from_each_other_are_those_of_each_alone(pieces, parts, nested):
    texts = ["".join(pieces[: i + 1]) for i in range(len(pieces))] if nested else pieces
    alone = [content_key("judgement", **parts, trace=text) for text in texts]
    assert content_keys("judgement", "trace", texts, **parts) == alone
