"""Rollouts on servers that are written out: what they are asked, what they answer, and what is logged."""

import asyncio
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np

from exprl_megatron.config.problems import LeakGuardConfig
from exprl_megatron.config.serving import ServerConfig
from exprl_megatron.errors import RunStopped
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.judging.leaks import LeakGuard
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.problems.prompts import PromptedProblems
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.serving.generation import Generation
from exprl_megatron.training.graded_sampling import GradedSampler
from exprl_megatron.training.rollouts import Rollouts
from exprl_megatron.training.run_problems import RunProblems
from exprl_megatron.training.step_sampling import RunStepSampler
from helpers.graded import stage

SECRET = "first add seven to nine and then halve whatever comes out of it"
CANARY = "canary-7f3a9c"
PROBLEMS = tuple(Problem(f"p{i}", f"What is {i}?", Reference(SECRET)) for i in range(6))


class Servers:
    """In place of a pool and of its clients: answers each request after some pauses, and keeps what it was asked.

    `scores` is what the traces of a problem are worth, `says` what they read, `slow` how many pauses they take.
    """

    name, url = "policy-0", "http://nowhere"

    def __init__(self, events, version="v0", says="an answer", slow=None):
        self.events, self.version, self.says, self.slow = events, version, says, slow or {}

    async def ask(self, home, call):
        return await call(self)

    async def prefill(self, token_ids):
        self.events.append(f"read {token_ids[0]}")

    async def generate(self, token_ids, seed, **sampling):
        self.events.append(f"ask {token_ids[0]}")
        for _ in range(self.slow.get(token_ids[0], 0)):
            await asyncio.sleep(0)
        return self._written()

    async def generate_all(self, prompts, seeds, **sampling):
        self.events.append(f"ask all {prompts[0][0]}")
        return [self._written() for _ in seeds]

    async def load_weights(self):
        self.events.append("judge's weights")

    def _written(self):
        return Generation(
            token_ids=np.array([5, 6], np.int32),
            log_probs=np.array([-1.0, -1.0], np.float32),
            text=self.says,
            finish_reason="stop",
            weight_versions=((self.version, 0, 2),),
            prompt_tokens=1,
            cached_tokens=0,
        )


class Judging:
    """Grades the traces of each problem with its `scores` in turn; None: an abstention."""

    def __init__(self, events, scores=None, refuses=()):
        self.events, self.scores, self.refuses = events, scores or {}, refuses

    async def check_judge(self, stage, step):
        self.events.append(f"gate {step}")
        if "gate" in self.refuses:
            raise RunStopped("the judge did not pass")

    def check_abstentions(self, stage, step, groups):
        self.events.append(f"abstentions {step}")
        if "abstentions" in self.refuses:
            raise RunStopped("too many abstentions")

    def grade(self, stage, tokenizer):
        async def grade(problem, trace):
            self.events.append(f"grade {problem.id}")
            score = self.scores.get(problem.id, (1.0, 0.0))[trace.sample]
            return GradedTrace(trace, Abstained("timeout") if score is None else Scored(score))

        return grade

    def take_counts(self):
        return {"asked": self.events.count("grade p0")}


class Log:
    """The rollout log."""

    def __init__(self, events):
        self.events, self.written = events, {}

    def write(self, stage, step, sampled):
        self.events.append(f"log {step}")
        self.written[stage, step] = sampled


@contextmanager
def _bar(*shown):
    yield SimpleNamespace(sampled=lambda: None, graded=lambda: None)


def rollouts(
    of_stage, events, *, judging=None, servers=None, shared_judge=False, prompts=None, by_groups=False, custom=None
):
    """Rollouts of PROBLEMS, each of which has the prompt (number,); `prompts` are their texts with the template.

    `custom` has the hooks of stages of the user's own by name.
    """
    config = SimpleNamespace(directory="nowhere", seed=3, server=ServerConfig(group_requests=by_groups))
    pool, logger, texts = servers or Servers(events), SimpleNamespace(rollouts=_bar), prompts or {}
    tokenizer = SimpleNamespace(decode=lambda ids: texts.get(ids[0], PROBLEMS[ids[0]].text))
    made = Rollouts.__new__(Rollouts)
    made._judging = judging or Judging(events)
    made._journal, made._custom_stages = Log(events), custom or {}
    made.problems = RunProblems(config, tokenizer, logger)
    made.problems.prompted = {of_stage.problems: PromptedProblems(PROBLEMS, tuple((i,) for i in range(6)), 0)}
    made.problems.guards = {of_stage.problems: LeakGuard(LeakGuardConfig(canary=CANARY), PROBLEMS)}
    made.sampler = GradedSampler(config, made.problems, tokenizer, pool, pool if shared_judge else None, logger)
    made._steps = RunStepSampler(made.problems, made.sampler, made._judging, tokenizer, None, logger)
    return made


def sparse(**changes):
    return stage("sparse-rl", **{"problems_per_step": 2, "group_size": 2} | changes)


def drawn(of_stage, first, count):
    """Return the problems after the first `first` of the stage, by the seeded order."""
    return [f"p{i}" for i in problem_indices(3, of_stage.name, first, count, 6)]
