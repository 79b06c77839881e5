"""Puts a run together: the policy at its place, and on rank 0 all that talks to servers and people."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.transport import choose_transport
from exprl_megatron.errors import Preempted
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.policy.checkpoint import intact_checkpoint, read_extra
from exprl_megatron.policy.policy import Policy
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.journal import Journal
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.fleet import Fleet
from exprl_megatron.serving.lent import LentServer
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint, judge_endpoints
from exprl_megatron.serving.registered_client import RegisteredClient
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.router import RoutedServers, RouterClient
from exprl_megatron.serving.router_spec import JUDGE_ROUTER, ROUTER
from exprl_megatron.serving.servers import FixedServers
from exprl_megatron.serving.shared_environment import nccl_difference
from exprl_megatron.training.console import Console
from exprl_megatron.training.evaluator import Evaluator
from exprl_megatron.training.judging_runtime import JudgingRuntime
from exprl_megatron.training.phase_switch import PhaseSwitch, put_to_sleep
from exprl_megatron.training.prefetch import RolloutPrefetch
from exprl_megatron.training.ref_scorer import RefScorer
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.run import RankZero, Run, ServerLinks
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import Members, WeightSync
from exprl_megatron.weight_sync.transports import make_transport

_SIGNAL_ROOM = 2.0
"""Ranks wait for rank 0's signal longer than rank 0 waits for a server, by this factor."""


def assemble(
    config: RunConfig, paths: RunDirectory, registry: Registry, on_failure: Callable[[BaseException], None]
) -> Run:
    """This rank's Run, standing where the last complete checkpoint left it (or at the start).

    Its servers are found in `registry`; `on_failure` is RolloutPrefetch's.
    Raises Preempted where the run is asked to stop before the servers are ready.
    """
    coordinator = RankCoordinator(_SIGNAL_ROOM * config.sync.deadline_s, paths.stop_request.is_file)
    checkpoint, damaged = intact_checkpoint(paths.checkpoints)
    progress = RunProgress() if checkpoint is None else RunProgress.from_record(read_extra(checkpoint))
    fleet, rollouts, prefetch, evaluator, console = None, None, None, None, None
    if coordinator.is_rank0:
        console = Console(config, paths, progress)
        for sentence in damaged:
            console.say(f"{sentence} The run goes on from {checkpoint.name}.")
        fleet = _fleet(config, registry, console) if config.needs_sampling_servers else None
        judges = _judges(config, registry, fleet)
        judging = JudgingRuntime(config, paths.judgements, judges, console)
        kept = RunDirectory(config.debug.rollouts) if config.debug.rollouts else paths
        rollouts = Rollouts(config, Journal(kept.journal), fleet, judges, judging, console)
        prefetch = RolloutPrefetch(coordinator, rollouts, on_failure)
        evaluator = Evaluator(config, paths, rollouts, judging, console)
    # Prompts first: what is wrong with them is known before the servers are up.
    coordinator.broadcast_from_rank0(lambda: rollouts.prepare())

    def policy_on_device() -> Policy:
        return Policy(_starting_policy(config, paths, progress), config.seed)

    if config.placement.kind == "colocated":
        # A server takes what it finds free of its GPU, and its ranks must find the same: the trainer comes second.
        _await_servers(coordinator, rollouts)
        put_to_sleep(coordinator, fleet)
        policy = policy_on_device()
    else:
        policy = policy_on_device()
        _await_servers(coordinator, rollouts)
    members = FixedServers([]) if fleet is None else fleet
    sync = _weight_sync(config, "policy", paths, members, policy, coordinator, console)
    scorer = _ref_scorer(config, paths, registry, policy, coordinator, console)
    phases = PhaseSwitch(config.placement, policy, coordinator, fleet, sync)
    return Run(
        config,
        paths,
        policy,
        coordinator,
        ServerLinks(sync, phases, scorer),
        RankZero(rollouts, prefetch, evaluator, console),
        (progress, checkpoint),
    )


def _await_servers(coordinator: RankCoordinator, rollouts: Rollouts | None) -> None:
    """Return when all servers are ready. Raises Preempted where the run is asked to stop before."""
    if not coordinator.broadcast_from_rank0(lambda: coordinator.run_unless_asked_to_stop(rollouts.open())):
        raise Preempted("The run was asked to stop while it waited for its servers; continue with --resume.")


def _fleet(config: RunConfig, registry: Registry, console: Console) -> Fleet:
    router = RouterClient(registry, ROUTER, config.server.request_deadline_s) if config.server.router else None
    vocabulary = read_architecture(config.policy.model).vocabulary
    return Fleet(registry, config.server, router=router, tell=console.say, vocabulary=vocabulary)


def _starting_policy(config: RunConfig, paths: RunDirectory, progress: RunProgress):
    """The policy config whose weights the current stage starts from."""
    if progress.stage == 0:
        return config.policy
    model = paths.models / config.stages[progress.stage - 1].name
    return config.policy.model_copy(update={"model": str(model), "initialise": "weights"})


def _ref_scorer(
    config: RunConfig,
    paths: RunDirectory,
    registry: Registry,
    policy: Policy,
    coordinator: RankCoordinator,
    console: Console | None,
) -> RefScorer | None:
    if not config.has_ref_server:
        return None
    client = ref_client(config, registry, (lambda text: None) if console is None else console.say)
    members = FixedServers([client])
    sync = _weight_sync(config, "ref", paths, members, policy, coordinator, console)
    scorer = RefScorer(client, sync, coordinator, config.server.start_deadline_s)
    scorer.open()
    return scorer


def ref_client(config: RunConfig, registry: Registry, tell: Callable[[str], None]) -> RegisteredClient:
    """A client of the server that scores the reference policy; `tell` is given a line for what a user should know."""

    def found(server: RegisteredServer) -> None:
        if (sentence := nccl_difference(server, config.ref_server)) is not None:
            tell(sentence)

    return RegisteredClient(registry, "ref-0", config.server.request_deadline_s, found)


def _judges(
    config: RunConfig, registry: Registry, fleet: Fleet | None
) -> Sequence[SGLangClient | OpenAIEndpoint | LentServer]:
    """Clients of the judge's servers. Their weights are frozen: they share no group with the trainer."""
    if not config.needs_judge:
        return []
    judge = config.judge
    if judge.endpoints:
        return judge_endpoints(judge)
    if judge.placement == "policy":
        return [
            LentServer(fleet, Path(judge.served_model), i, config.sync.deadline_s) for i in range(config.server.count)
        ]
    if judge.server.router:
        return [RoutedServers(registry, JUDGE_ROUTER, "judge", judge.deadline_s)]
    return [RegisteredClient(registry, f"judge-{i}", judge.deadline_s) for i in range(judge.server.count)]


def _weight_sync(
    config: RunConfig,
    servers: Literal["policy", "ref"],
    paths: RunDirectory,
    members: Members,
    policy: Policy,
    coordinator: RankCoordinator,
    console: Console | None,
) -> WeightSync:
    server = config.server if servers == "policy" else config.ref_server
    transport = make_transport(
        choose_transport(config, servers),
        [],
        server.tp,
        policy.world,
        coordinator,
        config.sync.deadline_s,
        directory=paths.sync / servers,
        model=Path(config.policy.model),
        **({} if console is None else {"tell": console.say}),
    )
    return WeightSync(config.sync, policy, coordinator, members, transport, server.tp)
