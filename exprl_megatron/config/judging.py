"""The judge: its model, its prompts, how its verdict is read, when its failures stop the run."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.serving import ServerConfig


class RubricConfig(Config):
    """What the judge measures a trace against."""

    kind: Literal["reference", "checkpoints"] = "reference"
    """The reference under a fixed scale, or weighted checkpoints that a language model drew from it, once."""
    prompt: str = "rubric-builder"
    """How checkpoints are asked for: `rubric-builder`, the hash of an earlier version of it, or a prompt file."""
    max_new_tokens: PositiveInt = 2048
    deadline_s: float = Field(300.0, gt=0)


class GateConfig(Config):
    """The judge must tell right traces from wrong ones before it may train, and go on doing so."""

    traces: str
    """JSON lines of traces whose correctness is known: what `exprl judge-bench` reads."""
    max_misplacement: float = Field(0.2, ge=0, le=1)
    """With the right reference."""
    min_separation: float = Field(0.1, ge=0, le=1)
    """Misplacement without the reference and with a wrong one must be larger by so much, at least; required only of a
    judge that is not within `max_misplacement` without the reference."""
    every_steps: PositiveInt | None = None
    """Checked again so often; None: only before the first stage that is judged."""
    limit: PositiveInt | None = None
    """Take the first so many traces."""


class JudgeConfig(Config):
    """A frozen language model that grades traces with the reference in its hands."""

    model: str
    """Directory in Hugging Face form; its tokenizer and template are used even where `endpoints` serve it."""
    endpoints: tuple[str, ...] = ()
    """Base URLs of OpenAI-compatible servers (`http://host:port/v1`); with none the run starts its own servers."""
    endpoint_model: str = "default"
    """The model's name there."""
    api_key_variable: str | None = None
    """Environment variable that holds the endpoints' key."""
    prompt: str | None = None
    """For whole traces of every domain: a prompt shipped in judging/prompts, or the path of a prompt file.
    None: the shipped one of the problem's domain. The hash of an earlier shipped prompt's content selects that one.
    A prompt that shows {rubric} is for marking checkpoints (and, where it says `Sound: `, soundness), another one
    for judging by the reference; where the other kind of judging is needed the shipped prompt is taken."""
    prefix_prompt: str | None = None
    """The same for prefixes."""
    segment_prompt: str | None = None
    """The same for segments."""
    prompt_order: Literal["shared", "upstream"] = "shared"
    """`shared` puts the trace last, so that a group's requests share their beginning; `upstream`, set by `reproduce:
    released`, the reference, and takes the first set of shipped prompts, which follows the released ones, where
    `shipped_prompts` names no other."""
    shipped_prompts: str | None = None
    """Hash of the set of shipped prompts to take, as a run's inputs.json has it under `judge.shipped_prompts`; None:
    the newest. It lets a run that was started with earlier prompts be resumed."""
    show_reference: bool = True
    """Without it the shipped prompts for judging without a reference are used."""
    rubric: RubricConfig = RubricConfig()
    template_args: dict[str, bool | str | int] = Field(default_factory=dict)
    """Passed to the judge's chat template (for example `enable_thinking: false`)."""
    max_new_tokens: PositiveInt = 2048
    temperature: float = Field(0.0, ge=0)
    score_format: Literal["free", "constrained"] = "free"
    """`constrained` makes the server write nothing but `Score: 1..5`."""
    score_reading: Literal["stated", "expected"] = "stated"
    """`expected` takes the mean over the probabilities of the digits 1..5 at the place of the stated one."""
    parser: Literal["last", "released"] = "last"
    """The last score stated, or, set by `reproduce: released`, the first `Score:` (without the released crash)."""
    reasks: NonNegativeInt = 1
    """Times an unreadable verdict is asked for again, sampled at `reask_temperature`."""
    reask_temperature: float = Field(0.3, gt=0)
    retries: NonNegativeInt = 3
    """Times a request is sent again after a transport error, each after twice the pause."""
    retry_pause_s: float = Field(0.5, gt=0)
    hedge_after_s: float | None = Field(None, gt=0)
    """A request without an answer for so long is sent to a second server too; the first answer counts."""
    concurrency: PositiveInt = 256
    deadline_s: float = Field(300.0, gt=0)
    """For one judgement, re-asks included; then it is an abstention."""
    max_abstention_rate: float = Field(0.5, ge=0, le=1)
    """A larger share of abstentions among the last `abstention_window` judgements stops the run."""
    abstention_window: PositiveInt = 512
    store: str | None = None
    """SQLite file of rubrics and judgements; None: `judgements.sqlite` in the run's directory."""
    gate: GateConfig | None = None
    place: Literal["own", "policy"] = "own"
    """`own` servers, or the `policy`'s, which hold the judge's weights when a step is sampled and until the next sync.
    Judge and policy must have the same architecture and vocabulary then."""
    server: ServerConfig = ServerConfig()

    @property
    def has_servers(self) -> bool:
        """Whether the run starts servers for the judge."""
        return not self.endpoints and self.place == "own"

    def violations(self, whole) -> list[str]:
        found = []
        if self.endpoints and self.score_format == "constrained":
            found.append(
                "judge.score_format is constrained, but nothing constrains what judge.endpoints write; set it to free."
            )
        if not self.show_reference and self.rubric.kind == "checkpoints":
            found.append(
                "judge.show_reference is false, but judge.rubric.kind is checkpoints, which are drawn from the "
                "reference; change one of them."
            )
        if self.place == "policy" and whole.judges:
            found += _lent_violations(self, whole)
        return found


def _lent_violations(judge: JudgeConfig, whole) -> list[str]:
    """Why the policy's servers cannot judge."""
    found = []
    if judge.endpoints:
        found.append("judge.place is policy, but judge.endpoints are given; drop one of them.")
    if judge.gate is not None:
        found.append(
            "judge.place is policy, but judge.gate asks the judge before a step is sampled; run `exprl judge-bench` "
            "instead and drop the gate, or set judge.place to own."
        )
    if whole.sync.fp8:
        found.append("judge.place is policy, but sync.fp8 is true, and the judge's weights are not in FP8; change one.")
    for stage in whole.stages:
        if getattr(stage, "max_staleness", 0):
            found.append(
                f"judge.place is policy, but stage {stage.name} samples while it learns (max_staleness is "
                f"{stage.max_staleness}), and the servers are never idle; set it to 0, or judge.place to own."
            )
    return found
