"""The workload of one step of a stage: numbers of traces and judgements, and their tokens."""

from dataclasses import dataclass

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import ExprlProcessStage, JudgedStage, RlStage, SftStage, Stage

PROMPT_TOKENS = 256
"""Of a problem with its system message, where nothing else is known."""
REFERENCE_TOKENS = 1024
"""Of what a judge reads before the trace: instructions, problem, rubric or reference."""
SEGMENTS = 8
"""Of a trace that is judged by segments or prefixes, at most."""
VERDICT_SHARE = 0.125
"""Of `judge.max_new_tokens`, the mean length of a verdict."""


@dataclass(frozen=True)
class Workload:
    """The workload of one step of one stage."""

    stage: str
    sampled: bool
    """Whether traces are sampled (all stages but SFT)."""
    problems: int
    traces: int
    """Of each problem."""
    prompt_tokens: float
    response_tokens: float
    """Mean."""
    max_response_tokens: float
    """Longest response."""
    updates: int
    """Optimizer steps."""
    keeps_ref_policy: bool
    """Whether the loss compares with the stage's reference policy."""
    judgements: int = 0
    """Of each trace; 0: no judge."""
    reference_tokens: float = REFERENCE_TOKENS
    """Of what a judge reads before the trace."""
    verdict_tokens: float = 0.0
    max_verdict_tokens: float = 0.0

    @property
    def sequence_length(self) -> float:
        """Mean tokens of a sequence: prompt and response."""
        return self.prompt_tokens + self.response_tokens

    @property
    def tokens(self) -> int:
        """Tokens of all sequences of the step."""
        return round(self.problems * self.traces * self.sequence_length)


def workload_of(
    config: RunConfig, stage: Stage, prompt_tokens: float | None = None, response_tokens: float | None = None
) -> Workload:
    """Return the workload of a stage's step. Unknown lengths are assumed: half of the longest response, a short
    prompt.
    """
    if isinstance(stage, SftStage):
        whole = config.policy.max_tokens
        response = min(response_tokens or whole / 2, whole)
        prompt = min(prompt_tokens or PROMPT_TOKENS, whole / 2)
        return Workload(stage.name, False, stage.batch_size, 1, prompt, response, response, 1, False)
    assert isinstance(stage, RlStage)
    bound = stage.sampling.max_new_tokens
    judged = isinstance(stage, JudgedStage) and config.judge is not None
    judged_spans = min(stage.judgements_per_trace, SEGMENTS) if isinstance(stage, ExprlProcessStage) else 1
    return Workload(
        stage=stage.name,
        sampled=True,
        problems=stage.problems_per_step,
        traces=stage.group_size,
        prompt_tokens=prompt_tokens or min(PROMPT_TOKENS, config.policy.max_tokens - bound),
        response_tokens=min(response_tokens or bound / 2, 0.99 * bound),
        max_response_tokens=bound,
        updates=stage.updates_per_step,
        keeps_ref_policy=stage.needs_ref_policy,
        judgements=judged_spans if judged else 0,
        verdict_tokens=config.required_judge.max_new_tokens * VERDICT_SHARE if judged else 0.0,
        max_verdict_tokens=config.required_judge.max_new_tokens if judged else 0.0,
    )
