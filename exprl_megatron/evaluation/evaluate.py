"""`exprl eval`: pass@k of a model on a set of problems, with its own servers."""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.errors import UserError
from exprl_megatron.evaluation.eval_config import EvalConfig
from exprl_megatron.evaluation.questions import EvalQuestion, EvalQuestions, read_questions
from exprl_megatron.evaluation.result_store import ProblemResult, ResultStore
from exprl_megatron.judging.judge_model import model_identity
from exprl_megatron.judging.judgement import Abstained, Judgement
from exprl_megatron.plugins.loading import use_plugin_path
from exprl_megatron.rewards.verifier import AnswerVerifier
from exprl_megatron.rollout.custom_functions import CustomFunction, custom_verifiers
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.sampler import sample_groups, sample_seed
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.server_command import irreproducible_sampling
from exprl_megatron.serving.server_process import start_servers, stop_servers
from exprl_megatron.serving.server_spec import ServerSpec, check_servers, server_specs
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.utils.accelerator import uses_cuda
from exprl_megatron.utils.together import gather_or_cancel

WEIGHT_VERSION = "initial"
"""The weight version of the traces."""


@dataclass(frozen=True)
class Evaluation:
    """The questions, and the result of each in the same order."""

    questions: EvalQuestions
    results: tuple[ProblemResult, ...]


@dataclass(frozen=True)
class Grading:
    """The user's verifiers by domain, and the function that prints lines about the evaluation."""

    custom: Mapping[str, CustomFunction]
    log: Callable[[str], None]


def evaluate(settings: EvalConfig, log: Callable[[str], None] = print) -> Evaluation:
    """Sample and verify the problems whose results are not in `settings.directory` yet.

    Finished problems stay there if the evaluation fails, and no process is left running.

    Raises:
        UserError: the input is bad; nothing has been started then.
        ServerError: a server fails.
    """
    settings.check()
    custom = _custom_verifiers(settings, log)
    logs = Path(settings.directory) / "logs"
    specs = server_specs(
        "policy",
        settings.model,
        settings.server,
        logs,
        dtype=settings.dtype,
        seed=settings.seed,
        weight_version=WEIGHT_VERSION,
    )
    check_servers(specs)
    evaluated = read_questions(settings)
    for line in evaluated.left_out():
        log(line)
    store = ResultStore(Path(settings.directory), settings.identity(model_identity(settings.model)))
    try:
        stored = [store.find(q.problem.id, q.key) for q in evaluated.questions]
        results = {result.problem_id: result for result in stored if result is not None}
        remaining = [q for q in evaluated.questions if q.problem.id not in results]
        log(f"{len(stored)} problems, {len(results)} of them finished before")
        if remaining:
            if sentence := irreproducible_sampling(settings.server, uses_cuda()):
                log(sentence)
            found = _measure(settings, specs, evaluated, remaining, store, Grading(custom, log))
            results |= {result.problem_id: result for result in found}
    finally:
        store.release()
    return Evaluation(evaluated, tuple(results[q.problem.id] for q in evaluated.questions))


def _measure(
    settings: EvalConfig,
    specs: Sequence[ServerSpec],
    evaluated: EvalQuestions,
    questions: Sequence[EvalQuestion],
    store: ResultStore,
    grading: Grading,
) -> list[ProblemResult]:
    log = grading.log
    with AnswerVerifier(settings.verifier_workers) as verifier:
        _check_sandbox(verifier, questions, grading.custom)
        log(f"starting {len(specs)} server{'s' if len(specs) > 1 else ''}")
        servers = start_servers(specs)
        try:
            clients = [server.client() for server in servers]
            for client in clients:
                client.vocabulary, client.text_check = evaluated.vocabulary, evaluated.text_check
            return asyncio.run(_sample(settings, clients, questions, verifier, store, grading))
        finally:
            stop_servers(servers)


def _custom_verifiers(settings: EvalConfig, log: Callable[[str], None]) -> dict[str, CustomFunction]:
    use_plugin_path(settings.plugin_path)
    config = VerifierConfig(domains=settings.verifiers, answer_deadline_s=settings.verifier_deadline_s)
    return custom_verifiers(config, log)


def _check_sandbox(verifier: AnswerVerifier, questions: Sequence[EvalQuestion], custom: Collection[str]) -> None:
    """Raise UserError where problems need programs and this machine cannot run them."""
    problem = next((q.problem for q in questions if q.problem.domain == "code" and "code" not in custom), None)
    if problem is None:
        return
    judgement = asyncio.run(verifier.verify(problem, "```python\npass\n```"))
    if isinstance(judgement, Abstained) and judgement.reason == "no-sandbox":
        raise UserError(
            f"Programs cannot be run safely on this machine ({judgement.evidence}); leave out the code problems, or "
            "use another machine."
        )


async def _sample(
    settings: EvalConfig,
    clients: Sequence[SGLangClient],
    questions: Sequence[EvalQuestion],
    verifier: AnswerVerifier,
    store: ResultStore,
    grading: Grading,
) -> list[ProblemResult]:
    """Answer all questions, each on one server, with `settings.concurrency` in flight."""
    problems_in_flight = max(1, settings.concurrency // settings.samples)
    slots = [asyncio.Semaphore(problems_in_flight) for _ in clients]
    finished: list[ProblemResult] = []

    async def one(question: EvalQuestion, client: SGLangClient, slot: asyncio.Semaphore) -> None:
        async with slot:
            samples = await _graded(settings, client, question, verifier, grading.custom)
        result = await asyncio.to_thread(store.save, question.problem.id, question.key, samples)
        finished.append(result)
        share = "-" if result.counts.solve_rate is None else f"{result.counts.solve_rate:.1%}"
        grading.log(f"{len(finished)}/{len(questions)} {question.problem.id}: {share} right")

    async with AsyncExitStack() as stack:
        for client in clients:
            await stack.enter_async_context(client)
        await gather_or_cancel(
            one(question, clients[i % len(clients)], slots[i % len(clients)]) for i, question in enumerate(questions)
        )
    return finished


async def _graded(
    settings: EvalConfig,
    client: SGLangClient,
    question: EvalQuestion,
    verifier: AnswerVerifier,
    custom: Mapping[str, CustomFunction],
) -> list[GradedTrace]:
    """Sample one problem with the seeds of a run's evaluation, and verify each sample as soon as it is finished."""
    judgements: dict[int, Judgement] = {}
    is_code = question.problem.domain == "code"
    deadline_s = settings.program_deadline_s if is_code else settings.verifier_deadline_s

    async def grade(trace: Trace) -> None:
        if question.problem.domain in custom:
            judgements[trace.sample] = await custom[question.problem.domain].verify(question.problem, trace)
            return
        judgements[trace.sample] = await verifier.verify(question.problem, trace.text, deadline_s)

    (traces,) = await sample_groups(
        StaticPool([client]),
        [question.prompt],
        settings.samples,
        settings.sampling,
        lambda problem_id, k: sample_seed(settings.seed, "evaluation", 0, problem_id, k),
        weight_versions=[WEIGHT_VERSION],
        on_trace=grade,
    )
    return [GradedTrace(trace, judgements[trace.sample]) for trace in traces]
