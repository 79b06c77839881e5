"""pass@k of the weights that the servers hold, on held-out problems; each evaluation is made once and kept."""

import json
from dataclasses import asdict

from exprl_megatron.config.run import RunConfig
from exprl_megatron.evaluation.pass_at_k import Counts
from exprl_megatron.evaluation.tally import estimates, tally
from exprl_megatron.training.console import Console
from exprl_megatron.training.directory import RunDirectory, write_atomically
from exprl_megatron.training.judging_side import JudgingSide
from exprl_megatron.training.rollouts import Rollouts


class Evaluator:
    """Lives on rank 0; one JSON file for each evaluation: {counts: {problem: [graded, correct]}, estimates: [...]}."""

    def __init__(
        self, config: RunConfig, paths: RunDirectory, rollouts: Rollouts, judging: JudgingSide, console: Console
    ):
        self._config = config
        self._directory = paths.evaluations
        self._rollouts = rollouts
        self._judging = judging
        self._console = console

    def done(self, name: str) -> bool:
        """Whether the evaluation `name` has been made."""
        return self._file(name).is_file()

    async def evaluate(self, name: str, version: str) -> None:
        """Sample the held-out problems under the weights `version` and verify every trace.

        All evaluations of a run draw the same seeds, so that they differ by the weights alone.
        """
        settings = self._config.evaluation
        groups = await self._rollouts.sample(
            ("evaluation", 0),
            settings.problems,
            range(self._rollouts.problem_count(settings.problems)),
            settings.samples,
            settings.sampling,
            [version],
            self._judging.grade_by_answer(),
        )
        tallies = {group.problem_id: tally(member.judgement for member in group.members) for group in groups}
        found = estimates(list(tallies.values()), settings.k, settings.confidence)
        counts = {problem_id: (of.graded, of.correct) for problem_id, of in tallies.items()}
        record = {"weight_version": version, "counts": counts, "estimates": [asdict(e) for e in found]}
        write_atomically(self._file(name), json.dumps(record, indent=1).encode())
        shown = ", ".join(f"pass@{e.k} {e.mean:.1%} [{e.low:.1%}, {e.high:.1%}]" for e in found)
        self._console.say(f"evaluation of {name}: {shown}")

    def all(self) -> dict[str, Counts]:
        """The counts of every evaluation made so far, in the order of the stages."""
        names = ["start", *(stage.name for stage in self._config.stages)]
        return {name: json.loads(self._file(name).read_text())["counts"] for name in names if self.done(name)}

    def _file(self, name: str):
        return self._directory / f"{name}.json"
