"""The judge: its model, its prompt, how its verdict is read, when its failures stop the run."""

from typing import Literal

from pydantic import Field, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.serving import ServerConfig


class JudgeConfig(Config):
    """A frozen language model that grades traces with the reference in its hands."""

    model: str
    """Directory in Hugging Face form."""
    prompt: str = "math-outcome"
    """A prompt shipped in judging/prompts, or the path of a prompt file."""
    template_args: dict[str, bool | str | int] = Field(default_factory=dict)
    """Passed to the judge's chat template (for example `enable_thinking: false`)."""
    max_new_tokens: PositiveInt = 2048
    temperature: float = Field(0.0, ge=0)
    score_format: Literal["free", "constrained"] = "free"
    """`constrained` makes the server write nothing but `Score: 1..5`."""
    reasks: int = Field(1, ge=0)
    """Times an unreadable verdict is asked for again, sampled at `reask_temperature`."""
    reask_temperature: float = Field(0.3, gt=0)
    concurrency: PositiveInt = 256
    deadline_s: float = Field(300.0, gt=0)
    """For one judgement, re-asks included; then it is an abstention."""
    max_abstention_rate: float = Field(0.5, ge=0, le=1)
    """A step with a larger share of abstentions stops the run."""
    server: ServerConfig = ServerConfig()
