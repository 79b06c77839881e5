"""Verification of final answers: in sparse-reward stages, in evaluations, and for the logs of judged stages."""

from typing import Literal

from pydantic import Field, PositiveInt

from exprl_megatron.config.base import Config
from exprl_megatron.config.plugin_path import PluginPath
from exprl_megatron.config.problems import Domain


class VerifierConfig(Config):
    """Verification of final answers, by one set of worker processes for the whole run."""

    workers: PositiveInt | Literal["auto"] = "auto"
    """Processes that compare mathematical answers, and as many that run programs; `auto`: one per core, at most 8."""
    variant: Literal["recommended", "prime", "code"] = "recommended"
    """How mathematical answers are verified; `prime` and `code`, which `reproduce: released` sets, are the verifiers of
    the released first and second stage."""
    answer_deadline_s: float = Field(5.0, gt=0)
    """Seconds for the comparison of one answer, and for one call of a verifier of your own."""
    program_deadline_s: float = Field(60.0, gt=0)
    """Seconds for all tests of one program."""
    test_deadline_s: float = Field(12.0, gt=0)
    """Wall-clock seconds for one test of a program; its CPU time is bounded too."""

    domains: dict[str, PluginPath] = Field(default_factory=dict)
    """Verifiers of your own by domain: (problem, trace) -> Scored | Abstained, async or not (docs/extending.md). One
    for a built-in domain replaces the built-in verifier."""

    def deadline_s(self, domain: Domain) -> float:
        """Return the deadline in seconds for one trace of a problem of `domain`."""
        built_in = domain not in self.domains
        return self.program_deadline_s if domain == "code" and built_in else self.answer_deadline_s
