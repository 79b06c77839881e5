"""The launcher: starts a run's processes, watches them, and stops all when one ends.

launch/nodes.py gives the reasons against torch.distributed.elastic.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import UserError, storage_sentence
from exprl_megatron.launch.devices import assign_gpus
from exprl_megatron.launch.dry_run import print_differences_from_released
from exprl_megatron.launch.exit_reports import RankFailed
from exprl_megatron.launch.input_checks import hash_checked_inputs
from exprl_megatron.launch.nodes import HeadNode, Node
from exprl_megatron.launch.preemption import request_stop_on_sigusr1, stop_on_sigusr1
from exprl_megatron.launch.ranks import TrainerRanks
from exprl_megatron.launch.run_record import RunRecord
from exprl_megatron.launch.starting import starter
from exprl_megatron.models.routing import with_router_replay
from exprl_megatron.processes.interruption import Interrupted
from exprl_megatron.processes.starter import Starter
from exprl_megatron.reporting.run_log import STARTED, RunLog, command_started
from exprl_megatron.runs.directory import PLUGINS, RunDirectory
from exprl_megatron.serving.keys import ensure_key, renew_key
from exprl_megatron.serving.registry import Registry
from exprl_megatron.serving.router_spec import JUDGE_ROUTER, ROUTER, RouterSpec
from exprl_megatron.serving.server_command import irreproducible_sampling
from exprl_megatron.serving.server_spec import SERVED_DTYPES, ServerSpec, check_servers, server_specs
from exprl_megatron.serving.server_supervisor import ServerSupervisor
from exprl_megatron.utils.accelerator import gpu_count, uses_cuda
from exprl_megatron.utils.files import Claim
from exprl_megatron.utils.ports import gloo_on_loopback

_POLL_S = 0.2


def launch(config: RunConfig, resume: bool, registered: bool = False, node: Node | None = None) -> None:
    """Run `config` to its end. This machine is node 0 of the trainer's nodes; the others call `run_worker_node`.

    No process is left running, regardless of how the run ends.

    Args:
        config: the config of the run.
        resume: whether to continue an earlier attempt.
        registered: whether the servers are started elsewhere (`exprl serve`) and found by their registrations.
        node: this machine among the trainer's nodes; None: it is the only one.

    Raises:
        UserError: the input is bad; nothing has been started then.
        ServerError: a server failed.
        RunStopped: the run ended early.
        Preempted: SIGUSR1 requested the end of the run.
    """
    node = node or Node()
    node.ranks(config.policy.layout.world_size)
    # The ranks' log lines show the time since this moment too.
    os.environ[STARTED] = str(command_started())
    log = RunLog()
    log.say(f"checking {config.directory}: models, problems and prompts")
    key_file = Registry(RunDirectory(config.directory).registry).key_file
    try:
        if node.nodes > 1:
            # Without it the other nodes accept no message, not even the end of this node.
            ensure_key(key_file)
        if not registered:
            # Ranks and servers inherit it.
            os.environ.update(gloo_on_loopback(os.environ))
        with HeadNode(node, key_file) as head, starter(config, servers=not registered) as start:
            _launch(config, resume, registered, node, head, start, log)
    except OSError as error:
        if (sentence := storage_sentence(error, config.directory)) is None:
            raise
        raise UserError(sentence) from error


def _launch(
    config: RunConfig, resume: bool, registered: bool, node: Node, head: HeadNode, start: Starter, log: RunLog
) -> None:
    directory = RunDirectory(config.directory)
    registry = Registry(directory.registry)
    specs = required_servers(config, directory)
    try:
        contents = hash_checked_inputs(config, start)
        if not registered:
            specs = assign_server_gpus(specs, config)
        changed = directory.changed_plugins(contents) if resume else []
        claim = directory.claim(config, resume, contents)
    except (UserError, OSError, Interrupted):
        if registered and not Claim.is_held(directory.root):
            registry.mark_ended()
        raise
    started = [spec for spec in specs if not registered or isinstance(spec, RouterSpec)]
    try:
        log.keep(directory.run_log)
        print_differences_from_released(config)
        for change in changed:
            print(f"exprl: {change}", file=sys.stderr, flush=True)
        if config.needs_sampling_servers and (sentence := irreproducible_sampling(config.server, uses_cuda())):
            log.say(sentence)
        # Servers that are registered elsewhere may have created the key already.
        (ensure_key if registered else renew_key)(registry.key_file)
        with RunRecord(directory.record, _plugins(contents)):
            _run(config, ServerSupervisor(started, registry, start, log.say), node, head, start, log)
    finally:
        registry.key_file.unlink(missing_ok=True)
        claim.release()


def _plugins(contents: Mapping[str, str]) -> dict[str, str]:
    """Return the hashes of the user's code by its path."""
    return {key.removeprefix(PLUGINS): value for key, value in contents.items() if key.startswith(PLUGINS)}


def _run(
    config: RunConfig, supervisor: ServerSupervisor, node: Node, head: HeadNode, start: Starter, log: RunLog
) -> None:
    """Start servers and ranks, watch them, and stop them all."""
    directory = RunDirectory(config.directory)
    registry = Registry(directory.registry)
    stop_on_sigusr1()
    ranks: TrainerRanks | None = None
    try:
        registry.clear_end()
        log.say(f"{_starting(supervisor)}; logs in {directory.logs}")
        supervisor.start()
        request_stop_on_sigusr1(directory.stop_request)
        head.signal_start()
        log.say(_ranks_sentence(len(node.ranks(config.policy.layout.world_size)), node))
        ranks = TrainerRanks(directory, config, directory.registry, node, start)
        while _all_run(ranks, head):
            head.raise_reported()
            supervisor.poll()
            time.sleep(_POLL_S)
    finally:
        if ranks is not None:
            ranks.stop()
        supervisor.stop()
        registry.mark_ended()


def _starting(supervisor: ServerSupervisor) -> str:
    """Return the line about the servers to start: `starting policy-0, policy-1 (MODEL), judge-0 (MODEL)`."""
    by_model: dict[str, list[str]] = {}
    for spec in supervisor.specs:
        by_model.setdefault(str(spec.model), []).append(spec.name)
    named = ", ".join(f"{', '.join(names)} ({model})" for model, names in by_model.items())
    return f"starting {named}" if named else "starting no server here"


def _ranks_sentence(here: int, node: Node) -> str:
    return f"starting {here} trainer process{'es' if here > 1 else ''}{' on this node' if node.nodes > 1 else ''}"


def _all_run(ranks: TrainerRanks, head: HeadNode) -> bool:
    """Return TrainerRanks.running; where a rank failed, raises the cause that another node may have reported."""
    try:
        return ranks.running()
    except RankFailed:
        head.check_for_killed()
        raise


def check_server_start(config: RunConfig) -> None:
    """Check whether this machine can start the run's servers: GPUs, ports, models, formats.

    Raises:
        UserError: it cannot.
    """
    assign_server_gpus(required_servers(config, RunDirectory(config.directory)), config)


def assign_server_gpus(specs: list[ServerSpec], config: RunConfig) -> list[ServerSpec]:
    """Assign GPUs of this machine to servers, and check the servers; nothing is started.

    Raises:
        UserError: see `assign_gpus` and `check_servers`.
    """
    found = assign_gpus(specs, config, gpu_count())
    check_servers(found)
    return found


def required_servers(config: RunConfig, directory: RunDirectory) -> list[ServerSpec]:
    """Return the servers that the stages and the evaluation of `config` need."""
    specs: list[ServerSpec] = []
    dtype = SERVED_DTYPES[config.policy.precision.dtype]
    if config.needs_sampling_servers:
        server = with_router_replay(config).sampling_server
        if config.placement.kind == "colocated" and uses_cuda():
            server = server.model_copy(update={"extra_args": (*server.extra_args, "--enable-memory-saver")})
        specs += server_specs("policy", config.policy.model, server, directory.logs, dtype=dtype, seed=config.seed)
    if config.needs_sampling_servers and config.server.router:
        specs.append(_router(ROUTER, config.policy.model, config.server, directory))
    if config.has_ref_server:
        specs += server_specs(
            "ref", config.policy.model, config.ref_server, directory.logs, dtype=dtype, seed=config.seed
        )
    if config.needs_judge and config.required_judge.has_servers:
        judge = config.required_judge
        specs += server_specs("judge", judge.served_model, judge.server, directory.logs, dtype=dtype, seed=config.seed)
        if judge.server.router:
            specs.append(_router(JUDGE_ROUTER, judge.served_model, judge.server, directory))
    return specs


def _router(name: str, model: str, servers: ServerConfig, directory: RunDirectory) -> RouterSpec:
    """Return the router of `servers`, which uses no GPU."""
    return RouterSpec(name, Path(model), servers.model_copy(update={"tp": 1, "port": None}), directory.logs)
