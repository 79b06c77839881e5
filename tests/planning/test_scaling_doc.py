"""docs/scaling.md beside the planner: every figure of its tables is what the command above it answers."""

import re
import shlex
from pathlib import Path

import pytest

from exprl_megatron.errors import UserError
from exprl_megatron.planning.activations import chunks_in_flight, layer_bytes_per_token
from exprl_megatron.planning.hardware import GIB, find_gpu
from exprl_megatron.planning.overrides import layout_text
from exprl_megatron.planning.plan import GpuAllocation, Plan, plan
from exprl_megatron.planning.plan_request import plan_target
from exprl_megatron.planning.targets import find_architecture, find_config
from exprl_megatron.planning.workload import workload_of

PAGE = Path("docs/scaling.md").read_text(encoding="utf-8")
HEADLINE = "llama-3.3-70b --gpus 64 --judge llama-3.3-70b"
CHEAP = 32
"""Rows of Llama on at most so many GPUs are tried among the fast tests too."""


def tables(first: str) -> list[list[str]]:
    """The cells of all rows of the tables whose first column is called `first`."""
    rows = []
    for table in re.findall(rf"^\| {first} \|.*\n\|[-:| ]+\n((?:\|.*\n)+)", PAGE, flags=re.MULTILINE):
        rows += [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]
    return rows


ROWS = tables("arguments")
CHANGES = tables("change")


def asked(arguments: str) -> Plan:
    """What `exprl plan` with these arguments answers."""
    words, options = shlex.split(arguments), {}
    while any(word.startswith("--") for word in words):
        at = next(i for i, word in enumerate(words) if word.startswith("--"))
        options[words[at]] = words[at + 1]
        del words[at : at + 2]
    response = options.get("--response-tokens")
    return plan_target(
        words[0],
        words[1:],
        find_gpu(options.get("--gpu", "h100")),
        gpus=int(options["--gpus"]),
        judge=options.get("--judge"),
        lengths=(None, float(response) if response else None),
    )


def test_the_page_has_its_tables():
    assert len(ROWS) >= 25 and len(CHANGES) >= 20
    for model in ("llama-3.3-70b", "qwen2.5-72b", "qwen3-32b", "qwen3-235b-a22b"):
        assert any(model in row[0] for row in ROWS)


@pytest.fixture(scope="module")
def headline() -> Plan:
    assert f"exprl plan {HEADLINE}\n" in PAGE
    return asked(HEADLINE)


def test_the_headline_is_what_the_command_answers(headline):
    own = headline.allocations[0]
    assert own.gpus == {"trainer": 40, "policy server": 16, "judge server": 8}
    assert own.servers == {"policy server": 8, "judge server": 4}
    assert layout_text(headline.trainer.layout) == "TP4 PP5 VPP8 CP2" and headline.trainer.policy.recompute == "none"
    assert f"A step takes {headline.step_s:.0f} s." in PAGE
    for phase in headline.phases:
        (line,) = re.findall(rf"^    │ {phase.name} +│(.*)│$", PAGE, flags=re.MULTILINE)
        seconds, _, works, rate, mfu = (cell.strip() for cell in line.split("│"))
        assert (seconds, works) == (f"{phase.seconds:.1f}", f"{phase.busy_s or phase.seconds:.1f}")
        if phase.speed:
            assert (rate, mfu) == (f"{phase.speed.tokens_per_s_per_gpu:,.0f}", f"{phase.speed.mfu:.1%}")
    memory = headline.trainer.memory
    assert f"holds {memory.total / GIB:.1f} of the" in PAGE
    for kind in ("weights", "gradients", "optimizer", "activations", "communication"):
        assert f"{kind} {getattr(memory, kind) / GIB:.1f}" in PAGE


def test_allocations_are_those_that_the_command_lists(headline):
    assert tables("trainers") == [allocation_cells(allocation) for allocation in headline.allocations]


def allocation_cells(allocation: GpuAllocation) -> list[str]:
    one = allocation.trainer
    return [
        str(allocation.gpus["trainer"]),
        layout_text(one.layout),
        one.policy.recompute,
        *servers(allocation),
        *(f"{value:.1f}" for value in (*sums(allocation), allocation.step_s)),
    ]


def servers(allocation: GpuAllocation) -> list[str]:
    return [f"{allocation.gpus[kind] // size} x TP{size}" for kind, size in allocation.servers.items()]


def sums(allocation: GpuAllocation) -> tuple[float, float, float]:
    """Seconds of sampling and judging, of learning, and of the rest."""
    seconds = allocation.seconds
    return (
        seconds["sample"] + seconds["judge"],
        seconds["log-probs"] + seconds["train"],
        seconds["reshard"] + seconds["save"],
    )


@pytest.mark.parametrize("cells", CHANGES, ids=lambda cells: cells[0].strip("`") or "as it is")
def test_changes_cost_what_the_page_says(cells):
    best = re.search(r'best="([^"]+)"', PAGE).group(1).split()
    config, _ = find_config("llama-3.3-70b", [*best, *cells[0].strip("`").split()], "llama-3.3-70b")
    found = plan(config, config.stages[0], workload_of(config, config.stages[0]), find_gpu("h100"))
    one = found.trainer
    learns = sum(phase.seconds for phase in found.phases if phase.name in ("ref log-probs", "log-probs", "train"))
    assert cells[1:] == [
        layout_text(one.layout),
        f"{one.memory.total / GIB:.1f}",
        f"{learns:.1f}",
        f"{one.tokens_per_s_per_gpu:,.0f}",
        f"{one.mfu:.1%}",
        "no" if found.faults else "yes",
    ]


def cheap(arguments: str) -> bool:
    return int(re.search(r"--gpus (\d+)", arguments).group(1)) <= CHEAP and arguments.startswith("llama")


@pytest.mark.parametrize(
    "cells",
    [pytest.param(row, id=row[0].strip("`"), marks=[] if cheap(row[0]) else [pytest.mark.slow]) for row in ROWS],
)
def test_plans_are_those_that_the_page_lists(cells):
    arguments = cells[0].strip("`")
    if cells[1] == "does not fit":
        with pytest.raises(UserError, match="do not hold trainer and servers"):
            asked(arguments)
        return
    found = asked(arguments)
    allocation, one = found.allocations[0], found.trainer
    samples, learns, _ = sums(allocation)
    assert cells[1:] == [
        f"{allocation.gpus['trainer']}: {layout_text(one.layout)}",
        one.policy.recompute,
        f"{one.memory.total / GIB:.1f}",
        *servers(allocation),
        *(f"{value:.0f}" for value in (samples, learns, found.step_s)),
    ]


def test_the_example_of_the_formulas_is_their_result(headline):
    policy = headline.trainer.policy
    architecture, _ = find_architecture("llama-3.3-70b")
    each = layer_bytes_per_token(architecture, policy.layout, policy.precision)
    pieces = chunks_in_flight(policy.layout, 0, 580)
    assert f"= {each:,.0f} bytes" in PAGE and f"{pieces} pieces of two layers" in PAGE
    assert f"are {4096 * pieces * 2 * each / GIB:.2f} GiB" in PAGE
