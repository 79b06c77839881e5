"""The user's verifiers and reward terms: what their results and failures become, and what the policy learns from."""

import asyncio
import sys
import textwrap
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from helpers.graded import graded

from exprl_megatron.config.load import check_config
from exprl_megatron.config.stages import ExprlOutcomeStage
from exprl_megatron.config.verifying import VerifierConfig
from exprl_megatron.errors import RunStopped, UserError
from exprl_megatron.judging.judgement import Abstained, Scored
from exprl_megatron.plugins.failures import PluginError
from exprl_megatron.plugins.loading import load_plugin
from exprl_megatron.problems.problem import Problem, Reference
from exprl_megatron.rollout.custom_functions import custom_verifiers
from exprl_megatron.rollout.group import GradedTrace, Group, RewardTerm
from exprl_megatron.rollout.trace import Trace
from exprl_megatron.training import judging_runtime
from exprl_megatron.training.custom_rewards import custom_terms
from exprl_megatron.training.grading import verified, with_terms
from exprl_megatron.training.sample_rewards import group_rewards
from exprl_megatron.training.statistics import group_statistics
from exprl_megatron.training.train_samples import token_advantages

PROBLEM = Problem("p", "How many?", Reference("There are four."), answer="4", domain="counting")
TRACE = Trace("p", 0, (1,), (2, 3, 4, 5), (-0.5,) * 4, "four \\boxed{4}", "stop", (("v0", 0, 4),))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write the module `mine`; returns its path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    load_plugin.cache_clear()

    def write(body: str) -> str:
        header = "from exprl_megatron.api import Abstained, Scored\nimport asyncio, time\n"
        (tmp_path / "mine.py").write_text(header + textwrap.dedent(body))
        return str(tmp_path / "mine.py")

    yield write
    sys.modules.pop("mine", None)
    load_plugin.cache_clear()


def verify(said: list[str] | None = None, deadline_s: float = 5.0):
    config = VerifierConfig(domains={"counting": "mine:verify"}, answer_deadline_s=deadline_s)
    custom = custom_verifiers(config, (said if said is not None else []).append)
    return asyncio.run(verified(None, config, custom)(PROBLEM, TRACE)).judgement


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_a_verifier_gets_problem_and_trace_and_its_verdict_is_the_judgement(module, kind):
    module(f"""
        {kind} verify(problem, trace):
            return Scored(float(problem.answer in trace.text), f"{{problem.id}} {{trace.finish_reason}}")
    """)
    assert verify() == Scored(1.0, "p stop")


def test_a_function_that_returns_what_an_async_one_does_is_awaited(module):
    module("""
        async def ask(problem, trace): return Scored(0.5)
        def verify(problem, trace): return ask(problem, trace)
    """)
    assert verify() == Scored(0.5)


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_code_that_exits_does_not_end_the_process(module, kind):
    file = module(f"""
        import sys
        {kind} verify(problem, trace):
            sys.exit("bye")
    """)
    found = verify()
    assert found.reason == "verifier-error" and f"{file}, line 6, in verify: " in found.evidence


def test_other_domains_keep_the_built_in_verifier(module):
    module("def verify(problem, trace): return Scored(0.0)")

    class BuiltIn:
        async def verify(self, problem, text, deadline_s):
            return Scored(1.0, "built in")

    config = VerifierConfig(domains={"counting": "mine:verify"})
    custom = custom_verifiers(config, print)
    grade = verified(BuiltIn(), config, custom)
    math = Problem("m", "1 + 1?", answer="2")
    assert [asyncio.run(grade(p, TRACE)).judgement.value for p in (PROBLEM, math)] == [0.0, 1.0]


@pytest.mark.parametrize("kind", ["async def", "def"])
@pytest.mark.parametrize("body", ["return {}['missing']", "return Scored(1.5)"])
def test_an_exception_is_an_abstention_that_names_the_users_line_and_is_said_once(module, kind, body):
    file = module(f"""
        {kind} verify(problem, trace):
            {body}
    """)
    said: list[str] = []
    config = VerifierConfig(domains={"counting": "mine:verify"})
    grade = verified(None, config, custom_verifiers(config, said.append))

    async def several():
        return await asyncio.gather(*(grade(PROBLEM, TRACE) for _ in range(3)))

    found = [member.judgement for member in asyncio.run(several())]
    assert {judgement.reason for judgement in found} == {"verifier-error"}
    assert f"mine:verify failed at {file}, line 5, in verify: " in found[0].evidence
    assert len(said) == 1 and file in said[0]


@pytest.mark.parametrize(("kind", "wait"), [("async def", "await asyncio.sleep(60)"), ("def", "time.sleep(60)")])
def test_a_verifier_that_gives_no_answer_in_time_abstains(module, kind, wait):
    file = module(f"""
        {kind} verify(problem, trace):
            {wait}
    """)
    found = verify(deadline_s=0.05)
    assert found.reason == "verifier-timeout"
    assert f"({file}, line 4) gave no answer within 0.05 s" in found.evidence


@pytest.mark.parametrize(("returned", "named"), [("1.0", "a float"), ("None", "a NoneType"), ("(1, '')", "a tuple")])
def test_another_type_than_a_verdict_stops_the_run_and_names_the_function(module, returned, named):
    file = module(f"def verify(problem, trace): return {returned}")
    with pytest.raises(PluginError, match=f"verifier.domains.counting: mine:verify .*, line 3.* returned {named} inst"):
        verify()
    with pytest.raises(PluginError, match=file):
        verify()


def outcome_stage(*terms: dict, **settings) -> ExprlOutcomeStage:
    stage = {
        "kind": "exprl-outcome",
        "name": "prime",
        "steps": 1,
        "problems": {"source": "x.jsonl"},
        "sampling": {"max_new_tokens": 8},
        "reward": list(terms),
    }
    tree = {"directory": "run", "policy": {"model": "m"}, "judge": {"model": "j"}, "stages": [stage | settings]}
    return check_config(tree, "test").stages[0]


def test_a_reward_is_the_weighted_sum_of_its_terms(module):
    module("def format(problem, trace): return trace.text.count('boxed')")
    stage = outcome_stage(
        {"term": "judge"},
        {"term": "verifier", "weight": 0.5},
        {"term": "mine:format", "weight": 0.2},
        {"term": "length", "weight": -0.1},
    )

    async def grade(problem, trace):
        return GradedTrace(trace, Scored(0.75), verified=Scored(1.0))

    custom = custom_terms("prime", stage.reward, 5.0, print)
    found = asyncio.run(with_terms(stage, grade, custom)(PROBLEM, TRACE))
    assert [(term.name, term.value) for term in found.terms] == [
        ("judge", 0.75),
        ("verifier", 1.0),
        ("format", 1.0),
        ("length", 0.5),
    ]
    # 0.75 + 0.5 * 1 + 0.2 * 1 - 0.1 * 4 tokens of 8
    assert found.reward == pytest.approx(1.4)
    assert found.score == 0.75


@pytest.mark.parametrize("returned", ["float('nan')", "float('inf')", "'a lot'", "None", "[1]"])
def test_a_term_that_is_not_a_finite_number_stops_the_run(module, returned):
    module(f"def format(problem, trace): return {returned}")
    stage = outcome_stage({"term": "judge"}, {"term": "mine:format"})
    (custom,) = custom_terms("prime", stage.reward, 5.0, print).values()
    with pytest.raises(PluginError, match=r"reward of stage prime: mine:format \(.*mine.py, line 3\) returned "):
        asyncio.run(custom.value(PROBLEM, TRACE))


@pytest.fixture
def runtime(module, monkeypatch, tmp_path):
    """The judging runtime of a sparse stage whose verifier and one term are the user's."""
    module("""
        def verify(problem, trace): return Scored(float("4" in trace.text))
        def none(problem, trace): raise OSError("no route")
        def two(problem, trace): return 2
    """)
    monkeypatch.setattr(judging_runtime, "_verifier", lambda config: nullcontext())

    def made(name: str):
        stage = {
            "kind": "sparse-rl",
            "name": "sparse",
            "steps": 1,
            "problems": {"source": "x.jsonl", "domains": ["counting"]},
            "reward": [{"term": "verifier"}, {"term": f"mine:{name}", "weight": 0.5}],
        }
        verifier = {"domains": {"counting": "mine:verify"}}
        tree = {"directory": "run", "policy": {"model": "m"}, "verifier": verifier, "stages": [stage]}
        config, said = check_config(tree, "test"), []
        logger = SimpleNamespace(log=said.append)
        return judging_runtime.JudgingRuntime(config, tmp_path, [], logger), config.stages[0], said

    return made


def test_a_run_grades_by_the_users_verifier_and_adds_the_terms_of_the_stage(runtime):
    judging, stage, _ = runtime("two")
    found = asyncio.run(judging.grade(stage, None)(PROBLEM, TRACE))
    assert (found.judgement.value, found.reward) == (1.0, 2.0)
    assert asyncio.run(judging.grade_by_answer()(PROBLEM, TRACE)).terms == ()
    judging.check_abstentions(stage, 1, [Group("p", (found,))])


def test_terms_that_fail_too_often_stop_the_run_with_the_users_line(runtime, tmp_path):
    judging, stage, said = runtime("none")
    found = asyncio.run(judging.grade(stage, None)(PROBLEM, TRACE))
    assert found.reward is None and len(said) == 1
    with pytest.raises(RunStopped, match=r"none: verifier-error: mine:none failed at .*mine\.py, line 5, in none: OS"):
        judging.check_abstentions(stage, 1, [Group("p", (found,))])


def term(source: str, value: float | None, weight: float = 1.0) -> RewardTerm:
    return RewardTerm(source, source, weight, value)


def test_traces_that_were_graded_for_another_reward_are_not_learned_from():
    stage = outcome_stage({"term": "judge"}, {"term": "a:f", "weight": -1.0})
    graded_so = (term("judge", 1.0), term("f", 2.0, -1.0))
    token_advantages(stage, [Group("p", (graded(0, 1.0, terms=graded_so),) * 2)])
    for terms in ((), graded_so[:1], (graded_so[0], term("f", 2.0, -0.5))):
        group = Group("p", (graded(0, 1.0, terms=graded_so), graded(1, 1.0, terms=terms)))
        with pytest.raises(UserError, match=r"stage prime were graded with .*config has judge x 1, f x -1; set reward"):
            token_advantages(stage, [group])
    with pytest.raises(UserError, match=r"graded with the reward terms judge x 1, f x -1, but its config has none"):
        token_advantages(outcome_stage(), [Group("p", (graded(0, 1.0, terms=graded_so),))])


def test_a_trace_whose_term_is_missing_is_out_of_statistics_and_loss():
    members = (
        graded(0, 1.0, terms=(term("judge", 1.0), term("f", 2.0, -1.0))),
        graded(1, 1.0, terms=(term("judge", 1.0), term("f", None, -1.0))),
        graded(2, 0.0, terms=(term("judge", 0.0), term("f", 0.0, -1.0))),
    )
    group = Group("p", members)
    rewards, valid = group_rewards(group, "score")
    assert rewards.tolist() == [-1.0, 0.0, 0.0]
    assert valid.tolist() == [True, False, True]
    stage = outcome_stage({"term": "judge"}, {"term": "a:f", "weight": -1.0}, advantage="mean-centered")
    (rows,) = token_advantages(stage, [group])
    assert rows[1] is None
    assert [row[0] for row in rows if row is not None] == [-0.5, 0.5]
    found = group_statistics([group], judged=True)
    assert found["reward/mean"] == -0.5
    assert found["reward/abstained"] == pytest.approx(1 / 3)
    assert found["reward/term/f"] == 1.0 and found["reward/term/judge"] == pytest.approx(2 / 3)
    assert found["score/mean"] == pytest.approx(2 / 3)


def test_an_overlong_trace_loses_the_judges_score_and_keeps_its_penalties():
    terms = (term("judge", 1.0), term("length", 1.0, -0.5))
    group = Group("p", (graded(0, 1.0, finish="length", terms=terms), graded(1, 1.0, terms=terms)))
    assert group_rewards(group, "zero")[0].tolist() == [-0.5, 0.5]
    assert group_rewards(group, "score")[0].tolist() == [0.5, 0.5]
    rewards, valid = group_rewards(group, "exclude")
    assert (rewards.tolist(), valid.tolist()) == ([0.0, 0.5], [False, True])


def test_a_bare_score_is_its_own_reward():
    group = Group("p", (graded(0, 0.25), graded(1, None)))
    assert [sample.reward for sample in group.samples] == [0.25, None]
    assert group.rewards == [0.25]
    assert isinstance(group.samples[1].judgement, Abstained)
