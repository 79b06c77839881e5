"""Debugging modes: a run does only one half of its work, or makes additional checks."""

from typing import Literal

from exprl_megatron.config.base import Config
from exprl_megatron.config.stages import RlStage, SelfDistillStage


class DebugConfig(Config):
    """Settings for debugging; not for a run whose result matters."""

    only: Literal["sampling", "learning"] | None = None
    """`sampling`: sample, grade and keep every step under the weights that the run starts from, and learn nothing.
    `learning`: learn from the steps that another run kept, without sampling servers, judge and evaluation."""
    rollouts: str | None = None
    """The directory of the run whose steps are learned from."""
    assertions: bool = False
    """Stop the run where an invariant is violated (`exprl train --assert`; see training/first_update.py)."""

    def violations(self, run_config) -> list[str]:
        found = []
        if (self.only == "learning") != (self.rollouts is not None):
            found.append(
                f"debug.only is {self.only or 'null'} and debug.rollouts is {self.rollouts or 'null'}; learning takes "
                "the steps of another run, so give both or neither."
            )
        if self.only is not None:
            found += [
                f"stage {stage.name} ({stage.kind}) has no rollouts, and debug.only is {self.only}; leave it out."
                for stage in run_config.stages
                if not isinstance(stage, RlStage)
            ]
        return found + (self._assertion_violations(run_config) if self.assertions else [])

    def _assertion_violations(self, run_config) -> list[str]:
        """Return the reasons why a run cannot check itself."""
        found = []
        if not run_config.sync.verify:
            found.append("debug.assertions compares weights after each sync, but sync.verify is false; set it to true.")
        if not run_config.compares_log_probs:
            found.append(
                "debug.assertions compares log-probs of trainer and sampler, but sync.max_log_prob_gap "
                f"({'null' if run_config.sync.max_log_prob_gap is None else 'auto'}) gives no bound here; set a number "
                "(1e-4 in fp32, about 0.02 in bf16)."
            )
        compared = (s for s in run_config.stages if isinstance(s, RlStage) and not isinstance(s, SelfDistillStage))
        if run_config.policy.ref_policy == "server" and any(stage.needs_ref_policy for stage in compared):
            found.append(
                "debug.assertions requires the KL to a stage's start to be exactly 0 at first, but policy.ref_policy "
                "is server, which rounds otherwise; set it to host."
            )
        return found
