"""Which requests of a run with router replay ask for the experts, and from which server the experts of a trace are."""

import asyncio
import base64
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from exprl_megatron.algorithms.batch import TrainSample
from exprl_megatron.config.serving import SamplingConfig, ServerConfig
from exprl_megatron.config.stages import SparseRlStage
from exprl_megatron.errors import ServerError
from exprl_megatron.evaluation import evaluate
from exprl_megatron.judging.answers import JudgeQuestion, TokenAnswerer
from exprl_megatron.judging.judgement import Scored
from exprl_megatron.models.routing import Routing
from exprl_megatron.problems.problem import Problem
from exprl_megatron.problems.prompts import PromptedProblems
from exprl_megatron.rollout.group import GradedTrace
from exprl_megatron.rollout.sampler import Prompt, sample_groups
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.static_pool import StaticPool
from exprl_megatron.training.evaluator import Evaluator
from exprl_megatron.training.graded_sampling import GradedSampler
from exprl_megatron.training.ref_scorer import RefScorer
from exprl_megatron.training.run_problems import RunProblems
from exprl_megatron.training.step_sampling import RunStepSampler

ROUTING = Routing(layers=2, top_k=2, experts=5)
PROMPT, VERSION = (1, 2, 3), "v1"


class Recorder(SGLangClient):
    """Keeps the bodies of its requests; each reply has two tokens, and the experts of this server where asked for."""

    def __init__(self, first_expert=0, error=None):
        super().__init__("http://nowhere", "policy-0")
        self.bodies, self.error, self.first_expert = [], error, first_expert

    async def _exchange(self, method, path, body, deadline_s, limit=0):
        self.bodies.append(body)
        if "logprob_start_len" in body:
            entries = [[None, 2, None], *([-0.5, token, None] for token in body["input_ids"][3:])]
            return json.dumps({"meta_info": self._meta(0) | {"input_token_logprobs": entries}}).encode()
        if body["sampling_params"] == {"max_new_tokens": 0}:
            return json.dumps({"text": "", "output_ids": [], "meta_info": self._meta(0)}).encode()
        if self.error is not None:
            raise self.error
        meta = self._meta(2) | {"output_token_logprobs": [[-0.5, 7, None], [-0.5, 8, None]]}
        if body.get("return_routed_experts"):
            ids = np.empty((len(PROMPT) + 1, ROUTING.layers, ROUTING.top_k), np.int32)
            ids[:] = self.first_expert, self.first_expert + 1
            meta["routed_experts"] = base64.b64encode(ids.tobytes()).decode()
        reply = {"text": "a", "output_ids": [7, 8], "meta_info": meta}
        return json.dumps(
            [reply] * len(body["input_ids"]) if isinstance(body["sampling_params"], list) else reply
        ).encode()

    def _meta(self, tokens):
        spans = [{"version": VERSION, "start": 0, "end": tokens}]
        return {
            "finish_reason": {"type": "stop"},
            "prompt_tokens": len(PROMPT),
            "weight_version": VERSION,
            "weight_versions": spans,
        }

    @property
    def asked(self):
        """Of each request whether it asked for experts in any way."""
        return ["routed_experts" in json.dumps(body, default=list) for body in self.bodies]


BAR = SimpleNamespace(sampled=lambda: None, graded=lambda: None)
LOGGER = SimpleNamespace(rollouts=lambda *shown: nullcontext(BAR), log=lambda text: None)


async def graded(problem, trace):
    return GradedTrace(trace, Scored(1.0))


JUDGING = SimpleNamespace(grade=lambda *how: graded, take_counts=dict, grade_by_answer=lambda: graded)


def steps_on(client, problems, whole_groups=False):
    """The steps of a run that replays routing, on one server, whose judge gives every trace a point.

    Beside them the problems and the sampler of the run.
    """
    config = SimpleNamespace(directory="nowhere", seed=0, server=ServerConfig(group_requests=whole_groups))
    tokenizer = SimpleNamespace(decode=lambda ids: "")
    of_run = RunProblems(config, tokenizer, LOGGER)
    of_run.prompted = {problems: PromptedProblems((Problem("p", "q"),), (PROMPT,), 0)}
    of_run.guards = {problems: SimpleNamespace(check_request=lambda *_: None, checks_traces=False)}
    sampler = GradedSampler(config, of_run, tokenizer, StaticPool([client]), None, LOGGER)
    return RunStepSampler(of_run, sampler, JUDGING, tokenizer, ROUTING, LOGGER), of_run, sampler


STAGE = SparseRlStage(kind="sparse-rl", name="s", steps=1, problems={"source": "p"}, problems_per_step=1, group_size=2)


@pytest.mark.parametrize("whole_groups", [False, True])
def test_a_stage_s_traces_are_sampled_with_their_experts_and_the_prefill_before_them_without(whole_groups):
    client = Recorder()
    steps, *_ = steps_on(client, STAGE.problems, whole_groups)
    sampled = asyncio.run(steps.sample_step(STAGE, 1, 0, [VERSION]))
    assert client.asked == ([False, True] if whole_groups else [False, True, True])
    assert all(s.trace.routed_experts.shape == (4, 2, 2) for group in sampled.groups for s in group.samples)


def test_a_run_s_evaluation_does_not_ask_for_experts(tmp_path):
    client = Recorder()
    _, problems, sampler = steps_on(client, STAGE.problems)
    rollouts = SimpleNamespace(problems=problems, sampler=sampler)
    settings = SimpleNamespace(problems=STAGE.problems, samples=2, k=[1], confidence=0.9, sampling=SamplingConfig())
    paths, config = SimpleNamespace(evaluations=tmp_path), SimpleNamespace(required_evaluation=settings)
    asyncio.run(Evaluator(config, paths, rollouts, JUDGING, LOGGER).evaluate("start", VERSION))
    assert client.asked == [False] * 3


def test_exprl_eval_does_not_ask_for_experts():
    client = Recorder()
    settings = SimpleNamespace(
        samples=2, sampling=SamplingConfig(), seed=0, program_deadline_s=1.0, verifier_deadline_s=1.0
    )

    async def verify(*_):
        return Scored(1.0)

    question = SimpleNamespace(problem=Problem("p", "q"), prompt=Prompt("p", PROMPT))
    client_version = evaluate.WEIGHT_VERSION

    class Served(Recorder):
        def _meta(self, tokens):
            meta = super()._meta(tokens)
            return meta | {"weight_versions": [{"version": client_version, "start": 0, "end": tokens}]}

    client = Served()
    found = asyncio.run(evaluate._graded(settings, client, question, SimpleNamespace(verify=verify), {}))
    assert len(found) == 2 and client.asked == [False] * 3


def test_a_judge_does_not_ask_for_experts_alone_or_by_groups():
    client = Recorder()
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: None)
    answerer = TokenAnswerer.__new__(TokenAnswerer)
    answerer._client, answerer._tokenizer, answerer._vocabulary = client, tokenizer, None
    answerer._text_check, answerer._digits = None, {}
    answerer._answer = lambda written: written
    question = JudgeQuestion(None, "t", PROMPT, 2, 0.0, 1, 1.0)

    async def ask():
        return await answerer.answer(question), await answerer.answers([question, question])

    asyncio.run(ask())
    assert client.asked == [False, False]


def test_a_reference_server_does_not_ask_for_experts():
    client = Recorder()
    coordinator = SimpleNamespace(broadcast_run=lambda start: asyncio.run(start()))
    scorer = RefScorer(client, SimpleNamespace(push_weights=lambda version: None), coordinator, 1.0)
    scorer._version = VERSION
    experts = np.zeros((4, 2, 2), np.uint8)
    (found,) = scorer.log_probs([TrainSample(PROMPT, (7, 8), routed_experts=experts)])
    assert found.tolist() == [-0.5, -0.5] and client.asked == [False]


class Retrying:
    """Sends a request that failed to the next server, as ServerPool does."""

    def __init__(self, *clients):
        self.clients = clients

    async def ask(self, home, call):
        for client in self.clients[:-1]:
            try:
                return await call(client)
            except ServerError:
                continue
        return await call(self.clients[-1])


def test_a_trace_that_another_server_samples_again_has_that_server_s_experts():
    lost, kept = Recorder(0, ServerError("it is dead")), Recorder(3)
    (group,) = asyncio.run(
        sample_groups(
            Retrying(lost, kept),
            [Prompt("p", PROMPT)],
            2,
            SamplingConfig(),
            lambda problem_id, k: k,
            weight_versions=[VERSION],
            routing=ROUTING,
        )
    )
    assert sum(lost.asked) == sum(kept.asked) == 2
    assert all(np.array_equal(np.unique(trace.routed_experts), [3, 4]) for trace in group)


def test_experts_of_other_tokens_than_the_trace_has_are_refused_in_one_sentence():
    """A prompt that the server counts otherwise than we do: its rows would be shifted."""

    class Shifted(Recorder):
        async def generate(self, *arguments, **settings):
            found = await super().generate(*arguments, **settings)
            return SimpleNamespace(**{**found.__dict__, "routed_experts": found.routed_experts[1:]})

    said = "returned the experts of 3 tokens for sample 0 of problem p, whose 5 tokens have 4"
    with pytest.raises(ServerError, match=said):
        asyncio.run(steps_on(Shifted(), STAGE.problems)[0].sample_step(STAGE, 1, 0, [VERSION]))
