"""The contract with code of the user: names, fields and signatures of `exprl_megatron.api`.

A change here that existing plugins notice raises API_VERSION and is in the changelog; a new field with a default is
added below and raises nothing.
"""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

from exprl_megatron import api

ROOT = Path(__file__).parents[1]
FIELDS = {
    "Abstained": ["reason: str", "evidence: str = ''", "hash: str | None = None"],
    "CodeTest": ["input: str", "output: str", "function: str | None = None"],
    "GradedTrace": [
        "trace: Trace",
        "judgement: Scored | Abstained",
        "segments: tuple[JudgedSegment, ...] = ()",
        "verified: Scored | Abstained | None = None",
        "terms: tuple[RewardTerm, ...] = ()",
    ],
    "Group": ["problem_id: str", "samples: tuple[GradedTrace, ...]", "domain: str = 'math'"],
    "LearnedTrace": ["trace: Trace", "advantages: float | ndarray | None = None"],
    "PromptProblem": ["id: str", "statement: str", "domain: str = 'math'"],
    "JudgedSegment": ["start: int", "end: int", "judgement: Scored | Abstained"],
    "Problem": [
        "id: str",
        "text: str",
        "reference: Reference | None = None",
        "answer: str | None = None",
        "domain: str = 'math'",
        "choices: tuple[str, ...] = ()",
        "tests: tuple[CodeTest, ...] = ()",
        "source: str = ''",
    ],
    "RewardTerm": ["name: str", "source: str", "weight: float", "value: float | None", "evidence: str = ''"],
    "Scored": ["value: float", "evidence: str = ''", "hash: str | None = None"],
    "StepInfo": ["stage: str", "step: int"],
    "SurrogateBatch": [
        "log_probs: Tensor",
        "old_log_probs: Tensor",
        "advantages: Tensor",
        "mask: Tensor",
        "clip_low: float",
        "clip_high: float",
    ],
    "Trace": [
        "problem_id: str",
        "sample: int",
        "prompt_ids: ndarray",
        "token_ids: ndarray",
        "log_probs: ndarray",
        "text: str",
        "finish_reason: str",
        "weight_versions: tuple[tuple[str, int, int], ...]",
        "cached_tokens: int = 0",
        "routed_experts: ndarray | None = None",
    ],
}
MEMBERS = {
    "GradedTrace": {"reward", "score", "judgements"},
    "Group": {"rewards", "scores"},
    "Problem": {"statement"},
    "Reference": {"for_judge", "for_training"},
    "Trace": {"overlong"},
}
ALIASES = {
    "Estimator": "Callable[['Tensor', 'Tensor'], 'Tensor']",
    "Judgement": "Scored | Abstained",
    "ProblemSource": "Callable[[str], Iterable[Mapping[str, Any]]]",
    "StepMetrics": "Callable[[StepInfo, Sequence[Group]], Mapping[str, float]]",
    "RewardFunction": "Callable[[Problem, Trace], 'float | Judgement | Awaitable[float | Judgement]']",
    "Surrogate": "Callable[['SurrogateBatch'], 'Tensor']",
    "Verifier": "Callable[[Problem, Trace], Scored | Abstained | Awaitable[Scored | Abstained]]",
}

HOOKS = {
    "CustomStage": {
        "kept_problems": "(self) -> Collection[str] | None",
        "learn": "(self, ctx: LearnContext, groups: Sequence[Group]) -> Sequence[LearnedTrace]",
        "load_state_dict": "(self, state: dict[str, Any]) -> None",
        "rollout": "(self, ctx: RolloutContext) -> Sequence[Group]",
        "state_dict": "(self) -> dict[str, Any]",
    },
    "LearnContext": {
        "default_learn": "(self, groups: Sequence[Group]) -> list[LearnedTrace]",
        "log": "(self, text: str) -> None",
        "log_metrics": "(self, metrics: Mapping[str, float]) -> None",
    },
    "RolloutContext": {
        "judge": "(self, trace: Trace) -> Scored | Abstained",
        "log": "(self, text: str) -> None",
        "next_problems": "(self, count: int | None = None) -> list[PromptProblem]",
        "problems": "property",
        "sample": "(self, problems: Sequence[PromptProblem], group_size: int | None = None, "
        "prompt: Callable[[PromptProblem], str] | None = None) -> list[Group]",
        "sample_step": "(self) -> list[Group]",
        "verify": "(self, trace: Trace) -> Scored | Abstained",
    },
}
ASYNC = {"rollout", "judge", "sample", "sample_step", "verify"}


def plain(annotation: object) -> str:
    """An annotation without the modules of its names."""
    text = annotation if isinstance(annotation, str) else None
    if text is None:
        text = annotation.__name__ if inspect.isclass(annotation) else str(annotation)
    return re.sub(r"\b[a-z_]+(\.[a-z_]+)*\.(?=[A-Z]|nda|tor)", "", text)


def described(field: dataclasses.Field) -> str:
    default = "" if field.default is dataclasses.MISSING else f" = {field.default!r}"
    return f"{field.name}: {plain(field.type)}{default}"


def test_the_names_are_those_of_this_version():
    assert api.API_VERSION == 1
    assert sorted(api.__all__) == sorted([*FIELDS, *ALIASES, *HOOKS, "API_VERSION", "PluginError", "Reference"])
    assert all(hasattr(api, name) for name in api.__all__)


def test_the_fields_of_every_class_are_those_of_this_version():
    found = {name: [described(field) for field in dataclasses.fields(getattr(api, name))] for name in FIELDS}
    assert found == FIELDS


def test_the_members_that_plugins_may_call_are_there():
    for name, members in MEMBERS.items():
        assert members <= set(dir(getattr(api, name))), name


def test_the_signatures_of_plugins_are_those_of_this_version():
    assert {name: plain(str(getattr(api, name)).replace("typing.", "")) for name in ALIASES} == ALIASES


def test_the_hooks_of_a_stage_and_what_they_are_given_are_those_of_this_version():
    found: dict[str, dict[str, str]] = {}
    for name in HOOKS:
        members = {key: value for key, value in vars(getattr(api, name)).items() if not key.startswith("_")}
        functions = {key: value for key, value in members.items() if inspect.isfunction(value)}
        found[name] = {key: plain(str(inspect.signature(value))) for key, value in functions.items()}
        found[name] |= {key: "property" for key, value in members.items() if isinstance(value, property)}
        assert {key for key, value in functions.items() if inspect.iscoroutinefunction(value)} == ASYNC & found[
            name
        ].keys()
    assert found == HOOKS
    assert plain(str(inspect.signature(api.CustomStage))) == "(settings: Mapping[str, Any])"


def test_every_class_and_kind_of_plugin_is_documented():
    source = (ROOT / "exprl_megatron" / "api.py").read_text(encoding="utf-8")
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert all(getattr(api, name).__doc__ for name in FIELDS)
    assert all(re.search(rf'^{name} = .*\n"""', source, re.MULTILINE) for name in ALIASES if name != "Judgement")
    assert [name for name in api.__all__ if f"`{name}`" not in page] == []


def test_a_verifier_can_be_written_without_torch():
    code = "import sys; from exprl_megatron.api import Problem, Scored, Trace; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
