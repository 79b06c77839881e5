"""Seconds of a weight sync in a plan are those of its messages; docs/resharding.md has what the command prints."""

import re
import shlex
from pathlib import Path

import pytest

from exprl_megatron.planning.hardware import find_gpu
from exprl_megatron.planning.plan import Plan, plan, with_syncs
from exprl_megatron.planning.plan_report import SYNC_COLUMNS, sync_cells
from exprl_megatron.planning.sync_broadcast import plan_sync
from exprl_megatron.planning.sync_p2p import plan_direct
from exprl_megatron.planning.targets import find_architecture, find_config
from exprl_megatron.planning.workload import workload_of

H100 = find_gpu("h100")
PAGE = Path("docs/resharding.md").read_text(encoding="utf-8")


def planned(arguments: str) -> Plan:
    model, *overrides = shlex.split(arguments)
    config, _ = find_config(model, overrides, None)
    return with_syncs(plan(config, config.stages[0], workload_of(config, config.stages[0]), H100))


def rows() -> list[list[str]]:
    """The cells of the page's table, without its first row."""
    (table,) = re.findall(
        rf"^\| {re.escape(' | '.join(SYNC_COLUMNS))} \|\n\|[-:| ]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE
    )
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.splitlines()]


def test_the_page_s_table_is_what_its_commands_print():
    (settings,) = re.findall(r'syncs="([^"]+)"', PAGE)
    commands = re.findall(r"^    exprl plan (\S+) \$syncs ?(.*)$", PAGE, re.MULTILINE)
    assert len(commands) == 2
    printed = []
    for model, more in commands:
        found = planned(f"{model} {settings} {more}")
        printed += [sync_cells(kind, sync) for kind, sync in found.syncs.items()]
    assert rows() == printed and [row[0] for row in printed] == ["direct", "broadcast", "handles"]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ("", "direct"),
        ("sync.transport=broadcast", "broadcast"),
        ("sync.transport=disk", "broadcast"),
        ("sync.fp8=true", "broadcast"),
        ("policy.precision=fp32", "direct"),
        ("server.count=1 placement.kind=colocated", "handles"),
        ("server.count=4 server.tp=2 placement.kind=colocated", "handles"),
    ],
)
def test_a_step_s_resharding_is_the_sync_s_plan(settings, kind):
    layout = "policy.layout.tp=2 policy.layout.pp=2 policy.layout.dp=4 server.count=2 server.tp=4"
    found = planned(f"qwen3-8b {layout} {settings}")
    config, architecture = found.config, find_architecture("qwen3-8b")[0]
    dtype = "float32" if "fp32" in settings else "bfloat16"
    asked = (architecture, config.policy.layout, dtype, int(config.sync.bucket_mb * 2**20), H100)
    servers = {"servers": config.server.count, "server_tp": config.server.tp}
    if kind == "direct":
        expected = plan_direct(*asked, **servers)
    else:
        expected = plan_sync(*asked, **servers, colocated=kind == "handles", fp8=config.sync.fp8)
    (phase,) = (phase for phase in found.phases if phase.name == "reshard")
    assert phase.seconds == expected.seconds
    assert found.syncs[kind] == expected


def test_colocated_servers_share_the_trainer_s_nodes():
    """Sixteen ranks on two nodes: four servers of two ranks are two on each; each node's first four ranks hand on."""
    found = planned(
        "qwen3-8b policy.layout.tp=2 policy.layout.dp=8 server.count=4 server.tp=2 placement.kind=colocated"
    )
    sync = found.syncs["handles"]
    gathering = {rank for rank, size in sync.received.items() if size >= 0.9 * sync.nbytes}
    assert {0, 1, 2, 3, 8, 9, 10, 11} >= gathering >= {1, 2, 3, 9, 10, 11}
