"""The rotary positions that a config.json asks for, where transformers, SGLang and Megatron-Core agree on them.

Files written by transformers 5 have them under `rope_parameters`, published ones under `rope_scaling` beside
`rope_theta`.
"""

import math
from dataclasses import dataclass

from exprl_megatron.errors import UserError
from exprl_megatron.models import qwen3_5


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretching of long wavelengths (transformers calls it rope type `llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class LinearScaling:
    """All wavelengths are stretched by `factor` (rope type `linear`)."""

    factor: float


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071; rope type `yarn`): a wavelength is stretched the more, the longer it is."""

    factor: float
    original_max_positions: int
    beta_fast: float
    """Wavelengths that turn at least this many times within the original length are not stretched."""
    beta_slow: float
    """Those that turn at most this many times are stretched by `factor`."""
    truncate: bool
    """Whether both bounds are moved outward to whole pairs of dimensions."""
    attention_factor: float
    """What rotated queries and keys are multiplied by."""


RopeScaling = Llama3Scaling | LinearScaling | YarnScaling


@dataclass(frozen=True)
class Rope:
    """Base of the wavelengths, and how they are stretched (None: not at all)."""

    base: float
    scaling: RopeScaling | None
    share: float = 1.0
    """Of a head's dimensions those that turn, the first ones."""


_FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "truncate",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
        },
    ),
}
"""Of each rope type the settings that it needs and those that it may have."""
_COMMON = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}
_SECTIONS = {"mrope_section", "mrope_interleaved"}
"""Which pairs turn with a picture's height and width; a text's tokens have one position for all of them."""
_DEFAULT_BASE = {"MixtralForCausalLM": 1e6}
"""Where a config.json without `rope_theta` does not mean 10,000, as transformers reads it."""
_DEFAULT_SHARE = {"Glm4MoeForCausalLM": 0.5} | dict.fromkeys(qwen3_5.NAMES, 0.25)
"""Architectures that may turn a share of each head, and the share where config.json does not say."""
_UNSCALED = {"MixtralForCausalLM": "Mixtral"}
"""Architectures that SGLang serves without any scaling, and with a whole base, whatever config.json says."""


class _Unsupported(Exception):
    """The setting that is not supported, as a noun phrase."""


def read_rope(tree: dict, path: str) -> Rope:
    """Return the rotary positions of the config.json `tree`, which was read from `path`.

    Raises:
        UserError: a setting is not supported, is unknown, or is read differently by the libraries.
    """
    try:
        return _rope(tree)
    except _Unsupported as error:
        raise UserError(
            f"{path} has {error}, which is not supported; docs/models.md lists the rotary settings that are."
        ) from None


def _rope(tree: dict) -> Rope:
    sections = [tree[name] for name in ("rope_parameters", "rope_scaling") if tree.get(name)]
    if not all(isinstance(section, dict) for section in sections):
        raise _Unsupported("rope settings that are not a table")
    name = (tree.get("architectures") or [""])[0]
    share = _share(_given("partial_rotary_factor", sections, tree, _DEFAULT_SHARE.get(name, 1.0)), name)
    scalings = [_scaling(section, tree) for section in sections]
    if len({(kind, scaling) for kind, scaling in scalings}) > 1:
        raise _Unsupported("rope_parameters and rope_scaling that contradict each other")
    values = _given("rope_theta", sections, tree, _DEFAULT_BASE.get(name, 10000.0))
    bases = {_positive("rope_theta", value) for value in values}
    if len(bases) > 1:
        raise _Unsupported(f"more than one rope_theta ({', '.join(map(str, dict.fromkeys(values)))})")
    (base,) = bases
    if base <= 1:
        raise _Unsupported(f"rope_theta {base}, which is not above 1")
    rope = Rope(base, scalings[0][1] if scalings else None, share)
    if name in _DEFAULT_SHARE and rope.scaling is not None:
        raise _Unsupported(f"rope type {scalings[0][0]} where a share of each head turns")
    if name in _UNSCALED and (rope.scaling is not None or rope.base != int(rope.base)):
        what = f"rope type {scalings[0][0]}" if rope.scaling else f"rope_theta {rope.base:g}"
        raise _Unsupported(f"{what} on {_UNSCALED[name]}, which SGLang serves as if it were not there")
    return rope


def _given(setting: str, sections: list[dict], tree: dict, default: float) -> list:
    """Return the values of `setting` for each of the `sections` and beside them.

    transformers reads one section alone, `rope_scaling` before `rope_parameters`; what that one lacks is `tree`'s value
    or the default.
    """
    beside = [tree[setting]] if setting in tree else []
    return beside + [section.get(setting, tree.get(setting, default)) for section in sections or [tree]]


def _share(values: list, name: str) -> float:
    """Return the share of a head that turns, of the given `values`."""
    shares = {_positive("partial_rotary_factor", value) for value in values}
    if len(shares) > 1:
        raise _Unsupported(f"more than one partial_rotary_factor ({', '.join(map(str, sorted(shares)))})")
    (share,) = shares
    if share != 1 and (name not in _DEFAULT_SHARE or share > 1):
        raise _Unsupported(f"partial_rotary_factor {share}")
    return share


def _scaling(rope: dict, tree: dict) -> tuple[str, RopeScaling | None]:
    """Return the rope type and scaling of one section."""
    if any(isinstance(value, dict) for value in rope.values()):
        raise _Unsupported("rope settings for each kind of layer")
    kinds = {str(rope[name]) for name in ("type", "rope_type") if rope.get(name)} or {"default"}
    if len(kinds) > 1:
        raise _Unsupported(f"both rope types {' and '.join(sorted(kinds))}")
    (kind,) = kinds
    if kind not in _FIELDS:
        raise _Unsupported(f"rope type {kind}")
    needed, allowed = _FIELDS[kind]
    sections = _SECTIONS if (tree.get("architectures") or [""])[0] in qwen3_5.NAMES else set()
    unknown = sorted(rope.keys() - needed - allowed - _COMMON - sections)
    if unknown:
        raise _Unsupported(f"{unknown[0]} beside rope type {kind}")
    lacking = sorted(name for name in needed if rope.get(name) is None)
    if lacking:
        raise _Unsupported(f"rope type {kind} without {lacking[0]}")
    return kind, _scaling_of(kind, rope, tree)


def _scaling_of(kind: str, rope: dict, tree: dict) -> RopeScaling | None:
    if kind == "default":
        return None
    factor = _positive("factor", rope["factor"])
    if factor < 1:
        raise _Unsupported(f"rope factor {factor:g}, which is below 1")
    if kind == "linear":
        return LinearScaling(factor)
    original = _original_length(rope, tree)
    if kind == "yarn":
        return _yarn(rope, factor, original)
    low, high = (_positive(name, rope[name]) for name in ("low_freq_factor", "high_freq_factor"))
    if high <= low:
        raise _Unsupported(f"high_freq_factor {high:g}, which is not above low_freq_factor {low:g}")
    return Llama3Scaling(factor, low, high, original)


def _yarn(rope: dict, factor: float, original: int) -> YarnScaling:
    # SGLang would use a null as a number.
    fast, slow = (_positive(name, rope.get(name, value)) for name, value in (("beta_fast", 32.0), ("beta_slow", 1.0)))
    if fast <= slow:
        raise _Unsupported(f"beta_fast {fast:g}, which is not above beta_slow {slow:g}")
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise _Unsupported(f"truncate {truncate!r}, which is neither true nor false")
    served, learned = _attention_factors(rope, factor)
    if not math.isclose(served, learned, rel_tol=1e-6):
        raise _Unsupported(
            f"rope settings that transformers reads as attention factor {learned:g} and SGLang as {served:g}"
        )
    return YarnScaling(factor, original, fast, slow, truncate, learned)


def _attention_factors(rope: dict, factor: float) -> tuple[float, float]:
    """Return YaRN's attention factor as SGLang 0.5.23 and as transformers 5 read it.

    SGLang does not know `attention_factor`, and takes `mscale` 0 for a number where transformers takes it for missing.
    """

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    query, every = rope.get("mscale"), rope.get("mscale_all_dim")
    for name, scale in (("mscale", query), ("mscale_all_dim", every)):
        if scale != 0 and scale is not None:
            _positive(name, scale)
    both = magnitude(query) / magnitude(every) if query is not None and every is not None else None
    served = magnitude(1.0) if both is None else both
    if rope.get("attention_factor") is not None:
        return served, _positive("attention_factor", rope["attention_factor"])
    return served, both if both is not None and query and every else magnitude(1.0)


def _original_length(rope: dict, tree: dict) -> int:
    """Return the length before it was stretched; transformers prefers the setting beside the section to the one
    in it.
    """
    name = "original_max_position_embeddings"
    inside = rope.get(name)
    if name in tree and tree[name] != inside:
        raise _Unsupported(f"{name} {tree[name]} outside the rope settings and {inside} among them")
    length = _positive(name, inside if inside is not None else tree.get("max_position_embeddings"))
    if length != int(length):
        raise _Unsupported(f"{name} {length}, which is not a whole number")
    return int(length)


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise _Unsupported(f"{name} {value!r}, which is not a positive number")
    return value
