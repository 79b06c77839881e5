"""What a run tells people and machines: lines and bars, metrics on disk, the closing table."""

from contextlib import AbstractContextManager

from rich.console import Console as Terminal

from exprl_megatron.config.run import RunConfig
from exprl_megatron.config.stages import Stage
from exprl_megatron.evaluation.table import Evaluations, evaluation_table
from exprl_megatron.reporting.metrics import MetricsWriter
from exprl_megatron.reporting.progress import Bar, StepProgress
from exprl_megatron.training.directory import RunDirectory
from exprl_megatron.training.recovery import Place


class Console:
    """Lives on rank 0; `place` is where the run goes on from."""

    def __init__(self, config: RunConfig, paths: RunDirectory, place: Place):
        self._config = config
        self._paths = paths
        self._terminal = Terminal()
        done = self._steps_before(place.stage) + place.step
        self._progress = StepProgress(self._steps_before(len(config.stages)) - done, self._terminal)
        self._metrics = MetricsWriter(paths.metrics, paths.tensorboard, done)

    def say(self, text: str) -> None:
        """One line."""
        self._progress.say(text)

    def bar(self, name: str, total: int) -> AbstractContextManager[Bar]:
        """Bars for the work inside a step."""
        return self._progress.bar(name, total)

    def step_done(self, stage: Stage, step: int, metrics: dict[str, float]) -> None:
        """A finished step's line and its metrics."""
        self._metrics.write(stage.name, self._steps_before(self._config.stages.index(stage)) + step, metrics)
        self._progress.step_done(stage.name, step, stage.steps, metrics, metrics["seconds/step"])

    def closing(self, evaluations: Evaluations) -> None:
        """The table of all evaluations and where everything lies."""
        if evaluations:
            confidence = self._config.evaluation.confidence
            self._terminal.print(evaluation_table(evaluations, "held-out problems", confidence))
        paths = self._paths
        self.say(f"models: {paths.models}  checkpoints: {paths.checkpoints}  metrics: {paths.metrics}")
        self.say(f"curves: tensorboard --logdir {paths.tensorboard}")

    def close(self) -> None:
        """Finish the files."""
        self._metrics.close()

    def _steps_before(self, stage: int) -> int:
        return sum(s.steps for s in self._config.stages[:stage])
