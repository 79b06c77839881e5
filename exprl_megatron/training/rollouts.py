"""Rank 0's part of a step: the servers that sample and judge, the check of the judge, and the rollout log."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import RlStage
from exprl_megatron.errors import UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.routing import Routing
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.runs.journal import Journal, SampledStep
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint
from exprl_megatron.serving.ready import wait_ready
from exprl_megatron.serving.server_pool import ServerPool
from exprl_megatron.serving.shared_judge import SharedJudgeClient
from exprl_megatron.training.custom_rollouts import StepContext
from exprl_megatron.training.custom_stages import StageHooks
from exprl_megatron.training.graded_sampling import GradedSampler
from exprl_megatron.training.judging_runtime import JudgingRuntime
from exprl_megatron.training.loop_lag import LoopLag
from exprl_megatron.training.run_logger import RunLogger
from exprl_megatron.training.run_problems import RunProblems
from exprl_megatron.training.step_sampling import RunStepSampler
from exprl_megatron.utils.text_check import text_check_of

_POLL_S = 1.0


class Rollouts:
    """Samples and grades traces and writes them to the rollout log; exists on rank 0, between `open` and `close`."""

    def __init__(
        self,
        config: RunConfig,
        journal: Journal,
        pool: ServerPool | None,
        judges: Sequence[SGLangClient | OpenAIEndpoint | SharedJudgeClient],
        judging: JudgingRuntime,
        logger: RunLogger,
        custom_stages: Mapping[str, StageHooks] = MappingProxyType({}),
    ):
        self._config = config
        self._custom_stages = custom_stages
        self._journal = journal
        self._pool = pool
        # Judges on the policy's servers are opened and closed with the pool.
        self._judges = [judge for judge in judges if not isinstance(judge, SharedJudgeClient)]
        shared_judge = next((judge for judge in judges if isinstance(judge, SharedJudgeClient)), None)
        self._judging = judging
        tokenizer = load_tokenizer(config.policy.model)
        if pool is not None and shared_judge is None:
            pool.text_check = text_check_of(tokenizer)
        replays = config.policy.router_replay
        self._routing = Routing.of(read_architecture(config.policy.model)) if replays else None
        self.problems = RunProblems(config, tokenizer, logger)
        self.sampler = GradedSampler(config, self.problems, tokenizer, pool, shared_judge, logger)
        self._steps = RunStepSampler(self.problems, self.sampler, judging, tokenizer, self._routing, logger)
        self.loop_lag = LoopLag()
        self._logger = logger

    async def open(self) -> None:
        """Open the connections and wait until every server is ready.

        Raises:
            ServerError: a server does not start.
        """
        self.loop_lag.start()
        for judge in self._judges:
            await judge.__aenter__()
        await asyncio.gather(
            *([] if self._pool is None else [self._pool.open()]),
            *(self._wait_for_judge(client) for client in self._judges),
        )

    async def _wait_for_judge(self, client: SGLangClient | OpenAIEndpoint) -> None:
        """Wait for a judge; what endpoints of others lack is reported immediately, as nothing else does."""
        report = self._logger.log if isinstance(client, OpenAIEndpoint) else None
        await wait_ready(client, self._config.judge.server.start_deadline_s, report)

    async def close(self) -> None:
        """Close the connections to the servers and the judge."""
        self.loop_lag.stop()
        if self._pool is not None:
            await self._pool.close()
        for judge in self._judges:
            await judge.__aexit__()
        self._judging.close()

    async def pause_generation(self) -> None:
        """Pause the traces in flight before an update of the weights, in the mode `sync.pause_mode`."""
        await self._pool.pause_generation(self._config.sync.pause_mode)

    async def continue_generation(self) -> None:
        """Continue the paused traces where they were, under the weights that the servers have now."""
        await self._pool.continue_generation()

    async def wait_for(self, work: Future) -> Literal["done", "weights", "nothing"]:
        """Wait up to a second for `work` of these rollouts; see ServerPool.wait_for."""
        return await self._pool.wait_for(work, _POLL_S)

    async def check_served(self) -> None:
        """Check the weights of newly registered servers (see ServerPool.check_served); does nothing without servers."""
        if self._pool is not None:
            await self._pool.check_served()

    def take_metrics(self, stage: str, step: int) -> dict[str, float]:
        """Return `gate/*` of a step whose judge was checked, and `servers/*` and `loop/*` since the last call."""
        servers = {} if self._pool is None else self._pool.take_metrics()
        lag = {"loop/lag_max_s": self.loop_lag.take()}
        return self._judging.take_gate_metrics(stage, step) | servers | lag

    def read_logged(self, stage: RlStage, step: int) -> SampledStep | None:
        """Read a step from the rollout log; None where the log has no complete record of it.

        Raises:
            UserError: the log is damaged; or router replay is on, and the log has no experts or those of another model.
        """
        sampled = self._journal.read(stage.name, step)
        if sampled is not None and self._routing is not None:
            _check_routed(sampled, self._routing, self._journal.path(stage.name, step))
        return sampled

    def has_sampled(self, stage: RlStage, step: int) -> bool:
        """Whether the rollout log has the step."""
        return self._journal.has(stage.name, step)

    def prune_log(self, stage: RlStage, step: int) -> None:
        """Delete the steps that `journal.keep_steps` does not keep, after a checkpoint of step `step`.

        The rollout log of another run (debug.rollouts) is not changed.
        """
        count = self._config.journal.keep_steps
        if count is not None and self._config.debug.rollouts is None:
            self._journal.keep_newest(stage.name, step, count)

    async def collect(self, stage: RlStage, step: int, prompts_consumed: int, versions: Collection[str]) -> SampledStep:
        """Sample and grade one step and write it to the rollout log.

        Args:
            stage: the stage.
            step: number of the step in the stage, from 1.
            prompts_consumed: number of the stage's problems that earlier steps have sampled.
            versions: every token must come from one of these weight versions (see sample_groups).

        Raises:
            ServerError: a server fails, and the request cannot be repeated elsewhere.
            RunStopped: the judge fails its gate, too many judgements are abstentions, or a reference leaks.
        """
        await self._judging.check_judge(stage, step)
        hooks = self._custom_stages.get(stage.name)
        if hooks is not None and hooks.samples:
            context = StepContext(self._steps, stage, step, prompts_consumed, versions)
            groups = await hooks.rollout(context)
            consumed = context.next_problem - prompts_consumed
            sampled = SampledStep(groups, consumed, self._judging.take_counts())
        else:
            sampled = await self._steps.sample_step(stage, step, prompts_consumed, versions)
        self._judging.check_abstentions(stage, step, sampled.groups)
        # In a thread, so that other steps' requests, judge deadlines and health checks continue in the meantime.
        await asyncio.to_thread(self._journal.write, stage.name, step, sampled)
        return sampled

    def custom_stage(self, stage: RlStage) -> StageHooks:
        """The hooks of a stage of the user's own."""
        return self._custom_stages[stage.name]


def _check_routed(sampled: SampledStep, routing: Routing, path: Path) -> None:
    found = [sample.trace.routed_experts for group in sampled.groups for sample in group.samples]
    for experts in found:
        if experts is None:
            raise UserError(
                f"The rollout log {path} has no routed experts: it was sampled without policy.router_replay; set the "
                f"key to false, or sample again."
            )
        layers, top_k = experts.shape[1:]
        largest = int(experts.max(initial=0))
        if (layers, top_k) != (routing.layers, routing.top_k) or largest >= routing.experts:
            raise UserError(
                f"The rollout log {path} has the routed experts of another model: {top_k} of at least {largest + 1} "
                f"experts in each of {layers} layers, where policy.model has {routing.top_k} of {routing.experts} in "
                f"each of {routing.layers}; set policy.router_replay to false, or policy.model to the model that "
                f"sampled the traces."
            )
