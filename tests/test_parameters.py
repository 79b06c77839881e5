"""Functions have at most 7 parameters, or a docstring that gives the reason for more."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "exprl_megatron"
MOST = 7
REASON = f"More than {MOST} parameters: "
EXCEPTIONS = {
    "commands/plan_command.py:_plan",
    "planning/plan_request.py:plan_target",
    "planning/rl_time.py:judging_time",
    "planning/sync_broadcast.py:plan_sync",
    "planning/training_time.py:log_prob_time",
    "planning/training_time.py:training_time",
    "policy/log_probs.py:forward",
    "policy/log_probs.py:response_log_probs",
    "rollout/sampler.py:sample_groups",
    "serving/client.py:update_from_distributed",
    "serving/generation_client.py:generate",
    "serving/server_command.py:server_command",
    "weight_sync/weight_exporter.py:__init__",
    "weight_sync/transports.py:make_transport",
}


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if "cpu_backend" not in path.parts:
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield f"{path.relative_to(PACKAGE)}:{node.name}", node


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether its parameters are the options of a command, each with its help text."""
    arguments = [*function.args.args, *function.args.kwonlyargs]
    return any("typer." in ast.unparse(one.annotation) for one in arguments if one.annotation)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [one.arg for one in arguments if one.arg not in ("self", "cls")]


def test_no_function_has_more_parameters_without_a_reason():
    many = {name: one for name, one in functions() if len(parameters(one)) > MOST and not is_command(one)}
    assert set(many) == EXCEPTIONS
    assert [name for name, one in many.items() if REASON not in (ast.get_docstring(one) or "")] == []
