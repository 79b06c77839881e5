"""Settings of `exprl eval`."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.plugin_path import PluginPath
from exprl_megatron.config.problems import ProblemsConfig, PromptConfig
from exprl_megatron.config.serving import SamplingConfig, ServerConfig
from exprl_megatron.errors import UserError
from exprl_megatron.plugins.loading import plugin_source, use_plugin_path


class EvalConfig(Config):
    """One model on one set of problems."""

    model: str
    """Directory in Hugging Face form."""
    problems: ProblemsConfig
    directory: str
    """Directory of all samples and results."""
    samples: PositiveInt = 128
    k: tuple[PositiveInt, ...] = (1, 4, 16, 128)
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, max_new_tokens=16_384)
    prompt: PromptConfig = PromptConfig()
    seed: NonNegativeInt = 0
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    server: ServerConfig = ServerConfig()
    concurrency: PositiveInt = 1024
    """Samples in flight at one server, in whole problems."""
    confidence: float = Field(0.95, gt=0, lt=1)
    verifier_deadline_s: float = Field(10.0, gt=0)
    """Seconds for the comparison of one answer."""
    program_deadline_s: float = Field(120.0, gt=0)
    """Seconds for all tests of one program."""
    verifier_workers: PositiveInt | Literal["auto"] = "auto"
    verifiers: dict[str, PluginPath] = Field(default_factory=dict)
    """Verifiers of the user by domain, as `verifier.domains` of a run."""
    plugin_path: tuple[str, ...] = ()
    """Directories in which their modules are searched."""

    def check(self) -> None:
        """Check that the settings do not contradict each other.

        Raises:
            UserError: they do.
        """
        found = [
            f"k contains {k}, more than the {self.samples} samples; raise --samples."
            for k in self.k
            if k > self.samples
        ]
        found += self.prompt.violations(self)
        if found:
            raise UserError("\n".join(found))

    def identity(self, model: str) -> dict:
        """Return the settings that must be equal to combine results, as JSON types; `model` is the model's hash."""
        return {
            "model": model,
            "samples": self.samples,
            "sampling": self.sampling.model_dump(mode="json"),
            "prompt": self.prompt.model_dump(mode="json"),
            "seed": self.seed,
            "dtype": self.dtype,
            **({"verifiers": self._verifier_sources()} if self.verifiers else {}),
        }

    def _verifier_sources(self) -> dict[str, str]:
        """Return the hash of each verifier's source: results of different verifiers are not combined."""
        use_plugin_path(self.plugin_path)
        return {domain: f"{path} {plugin_source(path).sha256}" for domain, path in sorted(self.verifiers.items())}
