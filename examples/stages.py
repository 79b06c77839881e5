"""Stages of one's own: `kind: examples.stages:CLASS` of a stage (docs/extending.md); examples/custom_stages.yaml."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from exprl_megatron.api import CustomStage, Group, LearnContext, LearnedTrace


class KeepSolvable(CustomStage):
    """Measures the policy's pass rate on each problem and learns nothing; keeps those between `low` and `high`.

    A later stage with `problems_from` and this stage's name learns from what was kept.
    """

    def __init__(self, settings: Mapping[str, Any]):
        super().__init__(settings)
        self.low, self.high = float(settings.get("low", 0.0)), float(settings.get("high", 1.0))
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(f"low is {self.low} and high {self.high}; set 0 <= low <= high <= 1")
        self.right: Counter[str] = Counter()
        self.tried: Counter[str] = Counter()

    def learn(self, ctx: LearnContext, groups: Sequence[Group]) -> Sequence[LearnedTrace]:
        """Count, and learn from nothing."""
        for group in groups:
            self.right[group.problem_id] += sum(score == 1.0 for score in group.scores)
            self.tried[group.problem_id] += len(group.scores)
        ctx.log_metrics({"kept": len(self.kept_problems()), "tried": len(self.tried)})
        return ()

    def kept_problems(self) -> list[str]:
        """Return the problems whose pass rate is within the bounds."""
        rates = {problem: self.right[problem] / tried for problem, tried in self.tried.items() if tried}
        return [problem for problem, rate in rates.items() if self.low <= rate <= self.high]

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"right": dict(self.right), "tried": dict(self.tried)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue to count."""
        self.right, self.tried = Counter(state["right"]), Counter(state["tried"])


class RejectionSampling(CustomStage):
    """Rejection-sampling fine-tuning: at most `keep` verified-correct traces of each problem, with maximum likelihood.

    For `objective: supervised`.
    """

    def learn(self, ctx: LearnContext, groups: Sequence[Group]) -> Sequence[LearnedTrace]:
        """Keep the shortest right answers."""
        learned = []
        for group in groups:
            right = [sample.trace for sample in group.samples if sample.score == 1.0 and not sample.trace.overlong]
            shortest = sorted(right, key=lambda trace: len(trace.token_ids))[: self.settings.get("keep", 4)]
            learned += [LearnedTrace(trace) for trace in shortest]
        ctx.log_metrics({"learned": len(learned)})
        return learned


class SecondAttempt(CustomStage):
    """Samples each problem twice: the second attempt reads the first, and learns from what it makes better."""

    async def rollout(self, ctx):
        """Sample first attempts, and as many second ones, each group of which reads one of the first."""
        problems = ctx.next_problems()
        first = {group.problem_id: group.samples[0].trace.text for group in await ctx.sample(problems, group_size=1)}
        return await ctx.sample(
            problems, prompt=lambda problem: f"{problem.statement}\n\nAn attempt:\n{first[problem.id]}\n\nDo it better."
        )
