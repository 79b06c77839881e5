"""The judge: its model, its prompts, the parser of its answers, and the bounds on its failures."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.serving import ServerConfig


class RubricConfig(Config):
    """The standard with which the judge compares a trace."""

    kind: Literal["reference", "checkpoints"] = "reference"
    """The reference under a fixed scale, or weighted checkpoints that a language model builds from it once."""
    prompt: str = "rubric-builder"
    """Prompt that requests checkpoints: `rubric-builder`, the hash of an earlier version of it, or a prompt file."""
    max_new_tokens: PositiveInt = 2048
    """Maximum length of a rubric in tokens."""
    deadline_s: float = Field(300.0, gt=0)
    """Seconds that the request for a rubric may take."""


class GateConfig(Config):
    """The calibration gate: the judge must separate right traces from wrong ones before it trains anything."""

    traces: str
    """JSON lines of traces whose correctness is known: what `exprl judge-bench` reads."""
    max_misplacement: float = Field(0.2, ge=0, le=1)
    """Maximum misplacement with the right reference."""
    min_separation: float = Field(0.1, ge=0, le=1)
    """Misplacement without the reference and with a wrong one must be larger by at least this much; required only of a
    judge that exceeds `max_misplacement` without the reference."""
    every_steps: PositiveInt | None = None
    """Check again every this many steps; None: only before the first judged stage."""
    limit: PositiveInt | None = None
    """Use this many traces from the beginning of the file."""


class JudgeConfig(Config):
    """A frozen language model that grades traces with the reference solution in its prompt."""

    model: str | None = None
    """Directory in Hugging Face format; its tokenizer and template are used even where `endpoints` serve the model.
    None: a closed API behind `endpoints`, whose prompts cannot be counted in tokens here (docs/extending.md)."""
    endpoints: tuple[str, ...] = ()
    """Base URLs of OpenAI-compatible servers (`http://host:port/v1`); with none the run starts its own servers."""
    endpoint_model: str = "default"
    """Name of the model at the endpoints."""
    endpoint_args: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    """Fields of each request to the endpoints, in addition to the usual ones or in their place; null leaves one out
    (for example `{max_tokens: null, max_completion_tokens: 2048, temperature: null}`)."""
    api_key_variable: str | None = None
    """Environment variable with the endpoints' key."""
    prompt: str | None = None
    """For whole traces of every domain: a prompt shipped in judging/prompts, or the path of a prompt file.
    None: the shipped prompt of the problem's domain. The hash of an earlier shipped prompt's content selects that one.
    A prompt that shows {rubric} is for marking checkpoints (and soundness, where it has `Sound: `), any other one
    for judging by the reference; where the other kind of judging is needed the shipped prompt is used."""
    prefix_prompt: str | None = None
    """The same for prefixes."""
    segment_prompt: str | None = None
    """The same for segments."""
    prompt_order: Literal["shared", "upstream"] = "shared"
    """`shared` puts the trace last, so that a group's requests share a prefix; `upstream`, set by `reproduce:
    released`, puts the reference last, and uses the first set of shipped prompts, which follows the released ones,
    unless `shipped_prompts` names another."""
    shipped_prompts: str | None = None
    """Hash of the set of shipped prompts to use, from `judge.shipped_prompts` in a run's inputs.json; None: the
    newest. With it a run that was started with earlier prompts can be resumed."""
    show_reference: bool = True
    """Whether the judge reads the reference; false: the shipped prompts without a reference are used."""
    rubric: RubricConfig = RubricConfig()
    template_args: dict[str, bool | str | int] = Field(default_factory=dict)
    """Passed to the judge's chat template (for example `enable_thinking: false`)."""
    max_new_tokens: PositiveInt = 2048
    """Maximum length of the judge's answer in tokens."""
    temperature: float = Field(0.0, ge=0)
    """Temperature of the first question."""
    score_format: Literal["free", "constrained"] = "free"
    """`constrained` restricts the answer to `Score: 1..5`."""
    score_reading: Literal["stated", "expected"] = "stated"
    """`expected` is the mean of the digits 1..5 under their probabilities at the position of the stated digit."""
    parser: Literal["last", "released"] = "last"
    """The last score stated, or, set by `reproduce: released`, the first `Score:` (without the released crash)."""
    reasks: NonNegativeInt = 1
    """Number of times that a question is repeated after an unreadable answer, sampled at `reask_temperature`."""
    reask_temperature: float = Field(0.3, gt=0)
    """Temperature of repeated questions after an unreadable answer."""
    retries: NonNegativeInt = 3
    """Number of times that a request is repeated after a transport error, each after twice the pause."""
    retry_pause_s: float = Field(0.5, gt=0)
    """Seconds before the first retry; the pause doubles from one retry to the next."""
    hedge_after_s: float | None = Field(None, gt=0)
    """Seconds after which a request without an answer is sent to a second server too; the first answer counts."""
    concurrency: PositiveInt = 256
    """Maximum number of questions in flight."""
    deadline_s: float = Field(300.0, gt=0)
    """Deadline of one judgement with its repetitions, in seconds; later it is an abstention."""
    max_abstention_rate: float = Field(0.5, ge=0, le=1)
    """A larger share of abstentions among the latest `abstention_window` judgements stops the run."""
    abstention_window: PositiveInt = 512
    """Number of latest judgements over which the share of abstentions is taken."""
    store: str | None = None
    """SQLite file of rubrics and judgements; None: `judgements.sqlite` in the run's directory."""
    gate: GateConfig | None = None
    placement: Literal["own", "policy"] = "own"
    """`own`: separate servers. `policy`: the policy's servers, which load the judge's weights after a step's sampling;
    judge and policy must have the same architecture and vocabulary."""
    server: ServerConfig = ServerConfig()

    @property
    def served_model(self) -> str:
        """Return the directory of the model that servers of the run load.

        Raises:
            ValueError: the judge is behind a closed API, which has none.
        """
        if self.model is None:
            raise ValueError("a judge behind a closed API has no model of its own")
        return self.model

    @property
    def shown_name(self) -> str:
        """Return the judge's name in tables and errors."""
        return self.model or self.endpoint_model

    @property
    def has_servers(self) -> bool:
        """Whether the run starts servers for the judge."""
        return not self.endpoints and self.placement == "own"

    def violations(self, run_config) -> list[str]:
        found = []
        if self.model is None and not self.endpoints:
            found.append("judge.model is missing; set it, or name the endpoints of an API (judge.endpoints).")
        if self.model is None and self.endpoints and self.endpoint_model == "default":
            found.append(
                "judge.model is missing and judge.endpoint_model is default; set endpoint_model to the API's name of "
                "the model, which distinguishes its judgements from those of other models."
            )
        if self.endpoint_args and not self.endpoints:
            found.append("judge.endpoint_args is set, but there are no judge.endpoints; remove it.")
        found += [
            f"judge.endpoint_args has {name!r}, which the judge sets itself; remove it."
            for name in sorted(self.endpoint_args.keys() & {"messages", "model", "n", "stream"})
        ]
        if self.endpoints and self.score_format == "constrained":
            found.append(
                "judge.score_format is constrained, but judge.endpoints cannot constrain answers; set it to free."
            )
        if not self.show_reference and self.rubric.kind == "checkpoints":
            found.append(
                "judge.show_reference is false, but judge.rubric.kind is checkpoints, which are built from the "
                "reference; change one of them."
            )
        if self.server.group_requests:
            found.append(
                "judge.server.group_requests is true, but only the policy's servers sample traces; set "
                "server.group_requests."
            )
        if self.placement == "policy" and run_config.needs_judge:
            found += _shared_server_violations(self, run_config)
        return found


def _shared_server_violations(judge: JudgeConfig, run_config) -> list[str]:
    """Return the reasons why the policy's servers cannot serve the judge."""
    found = []
    if judge.endpoints:
        found.append("judge.placement is policy, but judge.endpoints are given; drop one of them.")
    if judge.gate is not None:
        found.append(
            "judge.placement is policy, but judge.gate needs the judge before a step is sampled; run `exprl "
            "judge-bench` instead and drop the gate, or set judge.placement to own."
        )
    if run_config.sync.fp8:
        found.append(
            "judge.placement is policy, but sync.fp8 is true, and the judge's weights are not in FP8; change one."
        )
    for stage in run_config.stages:
        if getattr(stage, "max_staleness", 0):
            found.append(
                f"judge.placement is policy, but stage {stage.name} samples while it learns (max_staleness is "
                f"{stage.max_staleness}), and the servers are never idle; set it to 0, or judge.placement to own."
            )
    return found
