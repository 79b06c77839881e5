"""Names of the recipes and of the experiments, and what they are, without NeMo-Run, whose import takes seconds."""

import ast
from functools import cache
from pathlib import Path

MODELS = (
    "miniature",
    "smollm2_135m",
    "qwen3_4b",
    "qwen3_8b_mixed",
    "qwen3_32b",
    "llama3p3_70b",
    "qwen2p5_72b",
    "qwen3_235b_a22b",
    "glm4p5_air",
    "olmo3_32b",
    "qwen3p5_27b",
)
"""The modules that have a model's recipes."""
EXPERIMENTS = ("exprl", "sparse_rl", "sft", "self_distill", "exprl_then_sparse_rl")
"""The functions of recipes/entrypoints.py: what can be run of each model."""


@cache
def model_summary(name: str) -> str:
    """Return the first line of the docstring of the module `name`."""
    return _first_line(_tree(name))


@cache
def experiment_summary(name: str) -> str:
    """Return the first line of the docstring of the experiment `name`."""
    functions = (node for node in _tree("entrypoints").body if isinstance(node, ast.FunctionDef))
    return _first_line(next(function for function in functions if function.name == name))


def _tree(module: str) -> ast.Module:
    return ast.parse((Path(__file__).parent / f"{module}.py").read_text(encoding="utf-8"))


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]
