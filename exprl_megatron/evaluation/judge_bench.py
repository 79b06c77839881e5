"""`exprl judge-bench`: measures how reliable the judge of a config is, before it trains anything."""

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from exprl_megatron.config.judging import GateConfig, JudgeConfig
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.evaluation.judge_picture import ARM_NAMES, draw_arms
from exprl_megatron.evaluation.judge_tables import arms_table, wrong_steps_table
from exprl_megatron.judging.arms import ARMS, Arm, ArmMetrics, GradeText, arm_metrics, judge_arm
from exprl_megatron.judging.champ import MarkedTrace, load_champ
from exprl_megatron.judging.gate import GateResult, JudgeGate
from exprl_megatron.judging.judge import Judge
from exprl_megatron.judging.judgement import Granularity, Judgement
from exprl_megatron.judging.labeled_traces import LabeledTrace, read_labeled_traces
from exprl_megatron.judging.wrong_steps import GRANULARITIES, WrongStepMetrics, judge_wrong_steps
from exprl_megatron.models.tokenizer import load_tokenizer
from exprl_megatron.problems.problem import Problem
from exprl_megatron.reporting.picture_file import check_picture
from exprl_megatron.reporting.progress_bars import Bar, StepProgress
from exprl_megatron.serving.http_client import HttpClient
from exprl_megatron.serving.openai_endpoint import OpenAIEndpoint, judge_endpoints
from exprl_megatron.serving.ready import wait_ready
from exprl_megatron.serving.server_process import start_servers, stop_servers
from exprl_megatron.serving.server_spec import SERVED_DTYPES, server_specs
from exprl_megatron.utils.together import gather_or_cancel

# The judge itself uses the next few seeds for repeated questions.
_SEED_STEP = 1000


@dataclass(frozen=True)
class BenchOutput:
    """The outputs of a command; with `as_json` stdout has only JSON, and the tables are on stderr."""

    as_json: bool = False
    json_file: Path | None = None
    picture: Path | None = None

    @property
    def console(self) -> Console:
        """The console for the tables."""
        return Console(stderr=self.as_json)

    def write(self, record: dict[str, Any]) -> None:
        """Print and write the results where this was requested."""
        text = json.dumps(record, indent=2, allow_nan=False)
        if self.as_json:
            print(text)
        if self.json_file is not None:
            self.json_file.parent.mkdir(parents=True, exist_ok=True)
            self.json_file.write_text(text + "\n")


def bench_judge(
    config: RunConfig,
    traces_file: Path | None = None,
    limit: int | None = None,
    repeats: int = 0,
    output: BenchOutput | None = None,
) -> None:
    """Judge traces of known correctness with the right, no and a wrong reference; print and write the metrics.

    Args:
        config: the config of a run.
        traces_file: JSON lines of labeled traces; by default those of `judge.gate`.
        limit: number of traces to read from the beginning of the file.
        repeats: number of further judgements of each trace, sampled at `judge.reask_temperature`.
        output: where the results go.

    Raises:
        UserError: input or output cannot be used; nothing has been started then.
    """
    output = output or BenchOutput()
    check_picture(output.picture)
    judge, tokenizer = _judge_of(config)
    source = traces_file or (None if judge.gate is None else judge.gate.traces)
    if source is None:
        raise UserError("There are no labeled traces to judge; give --traces, or set judge.gate.traces.")
    count = limit or (judge.gate.limit if judge.gate and not traces_file else None)
    traces = read_labeled_traces(source, count, config.domains)
    with _servers(config) as clients:
        arms = asyncio.run(_arms(clients, _graders(judge, clients, tokenizer, repeats), traces))
    title = f"{judge.shown_name} on {len(traces)} traces of {len({trace.problem.id for trace in traces})} problems"
    gate = None
    if judge.gate is not None:
        gate = _gate_record(judge.gate.model_copy(update={"traces": str(source)}), traces, arms)
    console = output.console
    console.print(arms_table(list(arms.values()), title))
    if gate is not None:
        says = [*(["passed"] if gate["passed"] else []), *([gate["says"]] if gate["says"] else [])]
        console.print(f"gate: {': '.join(says)}", markup=False, highlight=False, soft_wrap=True)
    record = {arm: figures.to_dict() for arm, figures in arms.items()}
    output.write({"judge": judge.shown_name, "traces": str(source), "arms": record, "gate": gate})
    if output.picture is not None:
        draw_arms(list(arms.values()), title, output.picture)


def bench_judge_on_champ(config: RunConfig, limit: int | None = None, output: BenchOutput | None = None) -> None:
    """Measure the judge as a process judge at the first wrong steps that annotators marked in CHAMP.

    Args:
        config: the config of a run.
        limit: number of traces to read from the beginning of the data.
        output: where the results go.

    Raises:
        UserError: the data or the judge cannot be used; nothing has been started then.
    """
    output = output or BenchOutput()
    judge, tokenizer = _judge_of(config)
    traces = load_champ(limit)
    with _servers(config) as clients:
        units = asyncio.run(_wrong_steps(clients, Judge(judge, clients, tokenizer).grade, traces))
    output.console.print(wrong_steps_table(units, f"{judge.shown_name} on {len(traces)} outputs of CHAMP"))
    output.write({"judge": judge.shown_name, "units": {unit.granularity: unit.to_dict() for unit in units}})


def _judge_of(config: RunConfig) -> tuple[JudgeConfig, Any]:
    """Read the judge's config and tokenizer; raises UserError where they do not describe a judge."""
    if config.judge is None:
        raise UserError("The config has no judge; add the section `judge`.")
    model = config.judge.model
    if model is None:
        Judge(config.judge, (), None)
        return config.judge, None
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"{model}, the judge's model, has no config.json; give a directory in Hugging Face form.")
    tokenizer = load_tokenizer(model)
    Judge(config.judge, (), tokenizer)
    return config.judge, tokenizer


@contextmanager
def _servers(config: RunConfig) -> Iterator[Sequence[HttpClient]]:
    """Yield clients of the judge's endpoints, or of servers that run during the block."""
    if config.required_judge.endpoints:
        endpoints = judge_endpoints(config.required_judge)
        asyncio.run(_wait_for(endpoints, config.required_judge.server.start_deadline_s))
        yield endpoints
        return
    logs = Path(tempfile.mkdtemp(prefix="exprl-judge-bench-"))
    dtype = SERVED_DTYPES[config.policy.precision.dtype]
    servers = start_servers(
        server_specs(
            "judge",
            config.required_judge.served_model,
            config.required_judge.server,
            logs,
            dtype=dtype,
            seed=config.seed,
        )
    )
    try:
        yield [server.client() for server in servers]
    finally:
        stop_servers(servers)
    # The logs are deleted only on success, since an error names its log file.
    shutil.rmtree(logs)


async def _wait_for(endpoints: Sequence[OpenAIEndpoint], deadline_s: float) -> None:
    """Wait until all endpoints answer; what one lacks is printed immediately."""

    def report(sentence: str) -> None:
        print(f"exprl: {sentence}", file=sys.stderr, flush=True)

    async with _open(endpoints):
        await gather_or_cancel(wait_ready(endpoint, deadline_s, report) for endpoint in endpoints)


async def _arms(
    clients: Sequence[HttpClient], rounds: Sequence[GradeText], traces: Sequence[LabeledTrace]
) -> dict[Arm, ArmMetrics]:
    figures = {}
    async with _open(clients):
        for arm in ARMS:
            with StepProgress(0).bar(ARM_NAMES[arm], len(traces) * len(rounds)) as bar:
                judged = [await judge_arm(_counted(grade, bar), traces, arm) for grade in rounds]
            figures[arm] = arm_metrics(arm, traces, judged[0], judged[1:])
    return figures


async def _wrong_steps(
    clients: Sequence[HttpClient], grade: GradeText, traces: Sequence[MarkedTrace]
) -> list[WrongStepMetrics]:
    figures = []
    async with _open(clients):
        for granularity in GRANULARITIES:
            with StepProgress(0).bar(granularity, 2 * len(traces)) as bar:
                figures.append(await judge_wrong_steps(_counted(grade, bar), traces, granularity))
    return figures


@asynccontextmanager
async def _open(clients: Sequence[HttpClient]) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        yield


def _graders(config: JudgeConfig, clients: Sequence[HttpClient], tokenizer: Any, repeats: int) -> list[GradeText]:
    """Return the run's judge, and `repeats` judges that sample with other seeds, also their rubrics."""
    sampling = config.model_copy(update={"temperature": config.reask_temperature})
    sampled = [Judge(sampling, [_Reseeded(c, i) for c in clients], tokenizer) for i in range(1, repeats + 1)]
    return [judge.grade for judge in (Judge(config, clients, tokenizer), *sampled)]


def _counted(grade: GradeText, bar: Bar) -> GradeText:
    async def counted(problem: Problem, text: str, granularity: Granularity) -> Judgement:
        judgement = await grade(problem, text, granularity)
        bar.advance("judged")
        return judgement

    return counted


class _Reseeded:
    """A client that shifts the seed of every question."""

    def __init__(self, client: Any, shift: int):
        self._client = client
        self._shift = shift * _SEED_STEP

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    async def generate(self, *args: Any, seed: int, **settings: Any) -> Any:
        """Call the client's `generate` with the shifted seed."""
        return await self._client.generate(*args, seed=(seed + self._shift) % 2**31, **settings)

    async def generate_all(self, prompts: Any, seeds: Sequence[int], **settings: Any) -> Any:
        """Call the client's `generate_all` with shifted seeds."""
        return await self._client.generate_all(prompts, [(s + self._shift) % 2**31 for s in seeds], **settings)

    async def chat(self, *args: Any, seed: int, **settings: Any) -> Any:
        """Call the client's `chat` with the shifted seed."""
        return await self._client.chat(*args, seed=(seed + self._shift) % 2**31, **settings)


def _gate_record(config: GateConfig, traces: Sequence[LabeledTrace], arms: dict[Arm, ArmMetrics]) -> dict[str, Any]:
    """Return whether the gate would pass, with the reason or a note on a judge that needs no reference."""
    gate, result = JudgeGate(config, traces), GateResult(**arms)
    try:
        gate.require_pass(result, "this judge would stop a run")
    except RunStopped as stopped:
        return {"passed": False, "says": str(stopped)}
    return {"passed": True, "says": gate.no_reference_note(result)}
