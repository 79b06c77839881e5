"""Which rotary settings of a config.json are read, as what, and which are refused."""

import math

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.models.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling, read_rope

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
"""As Qwen's model cards ask for it."""
FOUR = 0.1 * math.log(4.0) + 1.0


def read(name: str = "LlamaForCausalLM", **settings) -> Rope:
    return read_rope({"architectures": [name], "max_position_embeddings": 131072} | settings, "m/config.json")


def both_forms(section: dict, base: float = 5e5) -> list[Rope]:
    old = section | {"type": section["rope_type"]}
    del old["rope_type"]
    return [
        read(rope_scaling=section, rope_theta=base),
        read(rope_scaling=old, rope_theta=base),
        read(rope_parameters=section | {"rope_theta": base}),
        read(rope_parameters=section | {"rope_theta": base}, rope_scaling=section | {"rope_theta": base}),
        read(rope_parameters=section, rope_scaling=section, rope_theta=base),
    ]


@pytest.mark.parametrize(
    ("section", "scaling"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 4}, LinearScaling(4)),
        (LLAMA3, Llama3Scaling(32.0, 1.0, 4.0, 8192)),
        (YARN, YarnScaling(4.0, 32768, 32.0, 1.0, True, FOUR)),
        (YARN | {"attention_factor": FOUR, "truncate": False}, YarnScaling(4.0, 32768, 32.0, 1.0, False, FOUR)),
        (YARN | {"beta_fast": 16, "beta_slow": 2}, YarnScaling(4.0, 32768, 16, 2, True, FOUR)),
        (YARN | {"mscale": 1.0}, YarnScaling(4.0, 32768, 32.0, 1.0, True, FOUR)),
        (YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}, YarnScaling(4.0, 32768, 32.0, 1.0, True, 1.0)),
        (YARN | {"mscale": None, "attention_factor": None}, YarnScaling(4.0, 32768, 32.0, 1.0, True, FOUR)),
    ],
)
def test_settings_are_read_in_the_published_form_and_in_that_of_transformers_5(section, scaling):
    assert both_forms(section) == [Rope(5e5, scaling)] * 5


def test_what_is_left_out_is_what_transformers_puts_there():
    yarn = {"rope_type": "yarn", "factor": 1}
    assert read(rope_scaling=yarn) == Rope(10000.0, YarnScaling(1, 131072, 32.0, 1.0, True, 1.0))
    assert read(rope_scaling=None) == read(rope_parameters={}) == Rope(10000.0, None)
    assert read("MixtralForCausalLM") == Rope(1e6, None)


def test_mscale_weighs_the_logarithm_of_the_factor_above_and_below_the_line():
    scaling = read(rope_scaling=YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}).scaling
    assert scaling.attention_factor == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


REFUSED = {
    "dynamic": ({"rope_type": "dynamic", "factor": 4.0}, "rope type dynamic"),
    "longrope": ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, "rope type longrope"),
    "the old name of longrope": ({"type": "su", "short_factor": [1.0]}, "rope type su"),
    "another type": ({"type": "proportional"}, "rope type proportional"),
    "two types": ({"type": "linear", "rope_type": "yarn", "factor": 4.0}, "both rope types linear and yarn"),
    "no type": ({"factor": 4.0}, "factor beside rope type default"),
    "an unknown setting": (YARN | {"finetuned": True}, "finetuned beside rope type yarn"),
    "SGLang's own factor": (YARN | {"attn_factor": 2.0}, "attn_factor beside rope type yarn"),
    "extrapolation": (YARN | {"extrapolation_factor": 0.5}, "extrapolation_factor beside rope type yarn"),
    "a setting of another type": (LLAMA3 | {"beta_fast": 32}, "beta_fast beside rope type llama3"),
    "yarn without factor": ({"rope_type": "yarn"}, "rope type yarn without factor"),
    "linear without factor": ({"rope_type": "linear", "factor": None}, "rope type linear without factor"),
    "a factor below 1": (YARN | {"factor": 0.5}, "rope factor 0.5, which is below 1"),
    "a factor that is text": (YARN | {"factor": "4"}, "factor '4', which is not a positive number"),
    "a null beta": (YARN | {"beta_fast": None}, "beta_fast None, which is not a positive number"),
    "betas the wrong way round": (
        YARN | {"beta_fast": 1, "beta_slow": 32},
        "beta_fast 1, which is not above beta_slow",
    ),
    "truncate as text": (YARN | {"truncate": "no"}, "truncate 'no', which is neither true nor false"),
    "a broken length": (YARN | {"original_max_position_embeddings": 0.5}, "0.5, which is not a whole number"),
    "no table": (["yarn"], "rope settings that are not a table"),
    "one for each kind of layer": ({"full_attention": {"rope_type": "yarn"}}, "rope settings for each kind of layer"),
    "partial rotation": ({"rope_type": "default", "partial_rotary_factor": 0.5}, r"partial_rotary_factor \(?0.5"),
    "bounds the wrong way round": (LLAMA3 | {"low_freq_factor": 8.0}, "high_freq_factor 4, which is not above"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("section", ["rope_scaling", "rope_parameters"])
def test_what_is_not_supported_is_refused_by_name_in_either_form(section, case):
    settings, said = REFUSED[case]
    with pytest.raises(UserError, match=rf"^m/config.json has .*{said}.*docs/models.md"):
        read(**{section: settings})
    with pytest.raises(UserError, match=said):
        read(rope_scaling=settings, rope_parameters={"rope_type": "default"})


@pytest.mark.parametrize(
    ("settings", "learned", "served"),
    [
        ({"attention_factor": 1.2}, "1.2", "1.13863"),
        ({"attention_factor": 1.0}, "1", "1.13863"),
        ({"attention_factor": FOUR, "mscale": 1.0, "mscale_all_dim": 1.0}, "1.13863", "1"),
        ({"mscale": 0, "mscale_all_dim": 1.0}, "1.13863", "0.878249"),
    ],
)
def test_attention_factors_that_transformers_and_sglang_read_differently_are_refused(settings, learned, served):
    with pytest.raises(UserError, match=rf"transformers reads as attention factor {learned} and SGLang as {served}"):
        read(rope_scaling=YARN | settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3}, "contradict each other"),
        ({"rope_parameters": LLAMA3 | {"factor": 8.0}, "rope_scaling": LLAMA3}, "contradict each other"),
        ({"rope_parameters": YARN | {"beta_fast": 16}, "rope_scaling": YARN}, "contradict each other"),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 1e6}, "rope_theta": 5e5}, "more than one rope_theta"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 4096}, "4096 outside the rope settings and 32768"),
        ({"rope_theta": 1}, "rope_theta 1, which is not above 1"),
        # transformers reads rope_scaling alone, and the default of what it lacks.
        (
            {"rope_parameters": YARN | {"rope_theta": 1e6}, "rope_scaling": YARN},
            r"more than one rope_theta \(1000000.0, 10000.0\)",
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "default"}},
            r"more than one rope_theta \(1000000.0, 10000.0\)",
        ),
        ({"rope_theta": None}, "rope_theta None, which is not a positive number"),
        ({"rope_theta": 0}, "rope_theta 0, which is not a positive number"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta None, which is not a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        read(**settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"rope_scaling": YARN}, "rope type yarn"), ({"rope_theta": 1234.5}, "rope_theta 1234.5")],
)
def test_a_mixtral_that_sglang_would_serve_unscaled_is_refused(settings, said):
    with pytest.raises(UserError, match=f"{said} on Mixtral, which SGLang serves as if it were not there"):
        read("MixtralForCausalLM", **settings)
