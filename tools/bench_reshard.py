"""Weight syncs from trainer processes to real servers on this machine, compared with their floor in one run.

A random Qwen3 of the given size is synced from each layout to a server of each tensor parallelism; after every sync
the servers' checksums are compared with the trainer's, which hashes its buckets while they are on their way
(--no-verify: neither, to see the transport alone where cores are few). The floor is the same bytes in the same pieces
through a bare torch broadcast between as many processes. Syncs and floors take turns; the table has their medians.

--checksums instead compares syncs without checksums, with those of shards (what a run does) and with SGLang's own, of
joined tensors, in turns: medians by the clock and of the processors of all processes of both sides.

--plan instead plans a sync by direct for models of full size, without weights or servers: processor seconds and memory
of rank 0, which plans for the servers too, and of another rank.

    python tools/bench_reshard.py --gb 1 [--layouts 1x1 2x1 1x2 2x2] [--server-tp 1 2] [--no-verify] [--json F]
    python tools/bench_reshard.py --checksums --gb 1 [--layouts 1x1 2x1] [--transports broadcast direct] [--json F]
    python tools/bench_reshard.py --plan [--json F]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from benchmarks.broadcast_floor import receive

from exprl_megatron.config.policy import Layout
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.serving.server_process import start_servers
from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.utils.ports import free_ports

HEAD = (
    f"{'source':>17} {'server':>7} {'GB':>5} {'floor s':>8} {'sync s':>7} {'share':>6}  "
    f"{'gather':>7} {'send':>7} {'load':>7} {'check':>7}"
)


def main(arguments: list[str] | None = None) -> None:
    """The command line; with --rank or --receiver one of the processes that it starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=0.25, help="size of the model's weights in bf16, 10**9 bytes")
    parser.add_argument("--layouts", nargs="+", default=["1x1"], help="source layouts, TPxPP or TPxPPxDP")
    parser.add_argument("--server-tp", type=int, nargs="+", default=[1])
    parser.add_argument("--transport", choices=["broadcast", "direct", "handles", "disk"], default="broadcast")
    parser.add_argument("--bucket-mb", type=float, default=64.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-verify", dest="verify", action="store_false", help="compare no checksums")
    parser.add_argument("--checksums", action="store_true", help="compare syncs with and without checksums")
    parser.add_argument(
        "--transports", nargs="+", default=["broadcast", "direct"], help="transports that --checksums compares"
    )
    parser.add_argument("--plan", action="store_true", help="plan syncs by direct for models of full size")
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--receiver", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.receiver is not None:
        receive(*args.receiver)
    elif args.rank is not None:
        run_rank(json.loads(args.rank.read_text()))
    elif args.plan:
        plan(args.json)
    elif args.checksums:
        compare_checksums(args)
    else:
        conduct(args)


def conduct(args: argparse.Namespace) -> None:
    """All measurements, as a table and, where asked for, as JSON."""
    settings = {name: getattr(args, name) for name in ("transport", "bucket_mb", "repeats", "verify")}
    print(f"{args.transport}, buckets of {args.bucket_mb:g} MiB, median of {args.repeats}\n{HEAD}", flush=True)
    records = []
    for task, workplace in layouts_and_servers(args):
        records.append(run_layout(task | {"settings": settings}, workplace))
        print(line(records[-1]), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(records, indent=1))


def compare_checksums(args: argparse.Namespace) -> None:
    """What checksums add to a sync, as a Markdown table and, where asked for, as JSON."""
    print("| transport | trainer | server | without | with | ratio | SGLang's own | CPU without | with | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    records = []
    for task, workplace in layouts_and_servers(args):
        for transport in args.transports:
            settings = {"transport": transport, "bucket_mb": args.bucket_mb, "repeats": args.repeats}
            found = run_layout(task | {"settings": settings, "checksums": True}, workplace)
            records.append(task | settings | {"seconds": found})
            none, shards, whole = (found[kind] for kind in ("none", "shards", "whole"))
            print(
                f"| {transport} | {task['layout']} | TP{task['server_tp']} | {none['wall_s']:.2f} | "
                f"{shards['wall_s']:.2f} | {shards['wall_s'] / none['wall_s']:.2f} | "
                f"{whole['wall_s'] / none['wall_s']:.2f} | {none['cpu_s']:.2f} | {shards['cpu_s']:.2f} | "
                f"{shards['cpu_s'] / none['cpu_s']:.2f} |",
                flush=True,
            )
    if args.json is not None:
        args.json.write_text(json.dumps(records, indent=1, default=str))


def layouts_and_servers(args: argparse.Namespace) -> Iterator[tuple[dict, Path]]:
    """Yield what `run_layout` is given, and a directory for its files: each layout with each server, which runs
    meanwhile.
    """
    from benchmarks.sync_runs import write_model

    with tempfile.TemporaryDirectory() as temporary:
        workplace = Path(temporary)
        model = write_model(workplace / "model", args.gb * 1e9)
        for tp in args.server_tp:
            config = ServerConfig(tp=tp, max_total_tokens=1024, extra_args=("--skip-tokenizer-init",))
            with start_servers([ServerSpec(f"tp{tp}", model, config, workplace, dtype="bfloat16")])[0] as server:
                held = {"name": server.name, "url": server.url, "key_file": str(server.key_file), "pid": server.pid}
                for layout in args.layouts:
                    yield {"layout": layout, "model": str(model), "servers": [held], "server_tp": tp}, workplace


def plan(file: Path | None) -> None:
    """What planning a sync by direct costs at full size, as a Markdown table and, where asked for, as JSON."""
    from benchmarks.direct_planning import CASES, measured

    records = []
    print("| model | trainer | servers | rank | messages it sends | CPU s | peak MB | kB from a server rank | to it |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for case in CASES:
        for rank in (0, case.layout.world_size - 1):
            cost = measured(case, rank)
            records.append({"case": f"{case.model}, {case.layout}", "servers": case.servers} | asdict(cost))
            print(
                f"| {case.model} | {case.layout.world_size} ranks | {case.servers} x TP{case.server_tp} | {rank} | "
                f"{cost.sent:,} | {cost.cpu_s:.2f} | {cost.peak_mb:.0f} | {cost.reported_kb:.1f} | "
                f"{f'{cost.orders_kb:.1f}' if rank == 0 else ''} |",
                flush=True,
            )
    if file is not None:
        file.write_text(json.dumps(records, indent=1))


def run_layout(task: dict, workplace: Path) -> dict:
    """Return one layout's processes and the floor's receivers; what rank 0 measured."""
    floor_port, port = free_ports(2)
    count = task["server_tp"] * len(task["servers"])
    result = workplace / "measured.json"
    (workplace / "task.json").write_text(json.dumps(task | {"floor_port": floor_port, "result": str(result)}))
    command, environment = [sys.executable, __file__], os.environ | {"OMP_NUM_THREADS": "1"}
    receivers = [
        subprocess.Popen([*command, "--receiver", str(floor_port), str(rank), str(count)], env=environment)
        for rank in range(1, count + 1)
        if not task.get("checksums")
    ]
    size = parsed(task["layout"]).world_size
    ranks = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        own = [*command, "--rank", str(workplace / "task.json")]
        ranks.append(subprocess.Popen(own, env=environment | place | meeting, stdout=sys.stderr))
    failed = [process.args for process in (*ranks, *receivers) if process.wait() != 0]
    if failed:
        sys.exit(f"{' '.join(failed[0])} failed")
    return json.loads(result.read_text())


def run_rank(task: dict) -> None:
    """One trainer process."""
    import torch
    from benchmarks.checksum_cost import measure_checksums
    from benchmarks.sync_runs import measure, to_dict

    torch.set_num_threads(1)
    sync = parsed(task["layout"]), Path(task["model"]), task["servers"], task["server_tp"]
    if task.get("checksums"):
        record = measure_checksums(*sync, task["settings"])
    else:
        measured = measure(*sync, task["floor_port"], task["settings"])
        record = measured and to_dict(measured)
    if record is not None:
        Path(task["result"]).write_text(json.dumps(record))


def parsed(layout: str) -> Layout:
    """Return a layout written as TPxPP or TPxPPxDP."""
    tp, pp, dp = ([int(size) for size in layout.split("x")] + [1])[:3]
    return Layout(tp=tp, pp=pp, dp=dp)


def line(record: dict) -> str:
    """Return one row of the table."""
    parts = record["parts"]
    return (
        f"{record['layout']:>17} {'TP' + str(record['server_tp']):>7} {record['gb']:5.2f} {record['floor_s']:8.3f} "
        f"{record['push_s']:7.3f} {record['share']:6.2f}  {parts['gather']:7.3f} {parts['send']:7.3f} "
        f"{parts['load']:7.3f} {parts['check']:7.3f}"
    )


if __name__ == "__main__":
    main()
