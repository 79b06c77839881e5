"""Assembles a run: the policy on its device, and on rank 0 the clients of the servers and the log."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from exprl_megatron.config.policy import PolicyConfig
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
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint, judge_endpoints
from exprl_megatron.serving.registered_client import RegisteredClient
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.router import RoutedClient, RouterClient
from exprl_megatron.serving.router_spec import JUDGE_ROUTER, ROUTER
from exprl_megatron.serving.server_pool import ServerPool
from exprl_megatron.serving.shared_environment import nccl_difference
from exprl_megatron.serving.shared_judge import SharedJudgeClient
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.training.custom_stages import custom_stages
from exprl_megatron.training.evaluator import Evaluator
from exprl_megatron.training.judging_runtime import JudgingRuntime
from exprl_megatron.training.phase_switch import PhaseSwitch, put_to_sleep
from exprl_megatron.training.prefetch import RolloutPrefetch
from exprl_megatron.training.ref_scorer import RefScorer
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.run import RankZero, Run, ServerLinks
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.utils.required import required
from exprl_megatron.weight_sync.coordinator import RankCoordinator
from exprl_megatron.weight_sync.sync import SyncTargets, WeightSync
from exprl_megatron.weight_sync.transports import make_transport

_SIGNAL_ROOM = 2.0
"""By this factor ranks wait longer for rank 0's signal than rank 0 waits for a server."""
_ROLLOUTS = "the object that samples rollouts"


def assemble(
    config: RunConfig, paths: RunDirectory, registry: Registry, on_failure: Callable[[BaseException], None]
) -> Run:
    """Return this rank's Run with the progress of the last complete checkpoint (or at the start).

    Args:
        config: the config of the run.
        paths: the directory of the run.
        registry: registrations of the servers.
        on_failure: see RolloutPrefetch.

    Raises:
        Preempted: the run is asked to stop before the servers are ready.
        UserError: an input cannot be used.
        ServerError: a server does not start.
    """
    coordinator = RankCoordinator(_SIGNAL_ROOM * config.sync.deadline_s, paths.stop_request.is_file)
    checkpoint, damaged = intact_checkpoint(paths.checkpoints)
    progress = RunProgress() if checkpoint is None else RunProgress.from_dict(read_extra(checkpoint))
    pool, rollouts, prefetch, evaluator, logger = None, None, None, None, None
    if coordinator.is_rank0:
        logger = RunLogger(config, paths, progress)
        for sentence in damaged:
            logger.log(f"{sentence} The run continues from {required(checkpoint, 'a checkpoint').name}.")
        pool = _pool(config, registry, logger) if config.needs_sampling_servers else None
        judges = _judges(config, registry, pool)
        judging = JudgingRuntime(config, paths.judgements, judges, logger)
        kept = RunDirectory(config.debug.rollouts) if config.debug.rollouts else paths
        custom = custom_stages(config, logger.log)
        rollouts = Rollouts(config, Journal(kept.journal), pool, judges, judging, logger, custom)
        prefetch = RolloutPrefetch(coordinator, rollouts, on_failure)
        evaluator = Evaluator(config, paths, rollouts, judging, logger)
    # Prompts first: their errors are known before the servers are ready.
    coordinator.broadcast_from_rank0(lambda: required(rollouts, _ROLLOUTS).problems.prepare())

    def policy_on_device() -> Policy:
        return Policy(_initial_policy(config, paths, progress), config.seed)

    if config.placement.kind == "colocated":
        # A server allocates the free memory of its GPUs, which must be equal on all of them: the trainer starts later.
        _await_servers(coordinator, rollouts)
        put_to_sleep(coordinator, pool)
        policy = policy_on_device()
    else:
        policy = policy_on_device()
        _await_servers(coordinator, rollouts)
    targets = StaticPool([]) if pool is None else pool
    sync = _weight_sync(config, "policy", paths, targets, policy, coordinator, logger)
    scorer = _ref_scorer(config, paths, registry, policy, coordinator, logger)
    phases = PhaseSwitch(config.placement, policy, coordinator, pool, sync)
    return Run(
        config,
        paths,
        policy,
        coordinator,
        ServerLinks(sync, phases, scorer),
        RankZero(rollouts, prefetch, evaluator, logger),
        (progress, checkpoint),
    )


def _await_servers(coordinator: RankCoordinator, rollouts: Rollouts | None) -> None:
    """Wait until all servers are ready; raises Preempted where the run is asked to stop before."""
    if not coordinator.broadcast_from_rank0(
        lambda: coordinator.run_unless_asked_to_stop(required(rollouts, _ROLLOUTS).open())
    ):
        raise Preempted("The run was asked to stop while it waited for its servers; continue with --resume.")


def _pool(config: RunConfig, registry: Registry, logger: RunLogger) -> ServerPool:
    router = RouterClient(registry, ROUTER, config.server.request_deadline_s) if config.server.router else None
    vocabulary = read_architecture(config.policy.model).vocabulary
    return ServerPool(registry, config.server, router=router, log=logger.log, vocabulary=vocabulary)


def _initial_policy(config: RunConfig, paths: RunDirectory, progress: RunProgress) -> PolicyConfig:
    """Return the policy config with the weights with which the current stage starts."""
    if progress.stage == 0:
        return config.policy
    model = paths.models / config.stages[progress.stage - 1].name
    return config.policy.model_copy(update={"model": str(model), "initialize": "weights"})


def _ref_scorer(
    config: RunConfig,
    paths: RunDirectory,
    registry: Registry,
    policy: Policy,
    coordinator: RankCoordinator,
    logger: RunLogger | None,
) -> RefScorer | None:
    if not config.has_ref_server:
        return None
    client = ref_client(config, registry, (lambda text: None) if logger is None else logger.log)
    targets = StaticPool([client])
    sync = _weight_sync(config, "ref", paths, targets, policy, coordinator, logger)
    scorer = RefScorer(client, sync, coordinator, config.server.start_deadline_s)
    scorer.open()
    return scorer


def ref_client(config: RunConfig, registry: Registry, log: Callable[[str], None]) -> RegisteredClient:
    """Return a client of the server that scores the reference policy; `log` receives lines for the user."""

    def found(server: RegisteredServer) -> None:
        if (sentence := nccl_difference(server, config.ref_server)) is not None:
            log(sentence)

    return RegisteredClient(registry, "ref-0", config.server.request_deadline_s, found)


def _judges(
    config: RunConfig, registry: Registry, pool: ServerPool | None
) -> Sequence[SGLangClient | OpenAIEndpoint | SharedJudgeClient]:
    """Return clients of the judge's servers, which have frozen weights and share no group with the trainer."""
    judge = config.judge
    if judge is None or not config.needs_judge:
        return []
    if judge.endpoints:
        return judge_endpoints(judge)
    if judge.placement == "policy":
        return [
            SharedJudgeClient(
                required(pool, "the pool of servers"), Path(judge.served_model), i, config.sync.deadline_s
            )
            for i in range(config.server.count)
        ]
    if judge.server.router:
        return [RoutedClient(registry, JUDGE_ROUTER, "judge", judge.deadline_s)]
    return [RegisteredClient(registry, f"judge-{i}", judge.deadline_s) for i in range(judge.server.count)]


def _weight_sync(
    config: RunConfig,
    servers: Literal["policy", "ref"],
    paths: RunDirectory,
    targets: SyncTargets,
    policy: Policy,
    coordinator: RankCoordinator,
    logger: RunLogger | None,
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
        **({} if logger is None else {"log": logger.log}),
    )
    return WeightSync(config.sync, policy, coordinator, targets, transport, server.tp)
