"""Graded groups and stages for tests, made by hand."""

from exprl_megatron.config.load import check_config
from exprl_megatron.judging.judgement import Abstained, Judgement, Scored
from exprl_megatron.rollout.group import GradedTrace, Group, JudgedSegment
from exprl_megatron.rollout.trace import Trace


def judgement(verdict: float | None) -> Judgement:
    return Abstained("timeout") if verdict is None else Scored(verdict)


def graded(sample: int, verdict: float | None, tokens: int = 3, finish: str = "stop", **fields) -> GradedTrace:
    ids = tuple(range(10, 10 + tokens))
    trace = Trace("p", sample, (1,), ids, (-0.5,) * tokens, "t", finish, (("v0", 0, tokens),))
    return GradedTrace(trace, judgement(verdict), **fields)


def group(*verdicts: float | None, finish: str = "stop", tokens: int = 3, domain: str = "math") -> Group:
    """Return a group whose traces were judged whole; None: the judge abstained."""
    members = (graded(i, verdict, tokens, finish) for i, verdict in enumerate(verdicts))
    return Group("p", tuple(members), domain)


def cut(sample: int, *segments: tuple[float | None, int], finish: str = "stop", right: float | None = None):
    """Return a trace judged by segments, each (verdict, tokens); `right`: what the verifier found."""
    judged, start = [], 0
    for verdict, tokens in segments:
        judged.append(JudgedSegment(start, start + tokens, judgement(verdict)))
        start += tokens
    first_missing = next((None for verdict, _ in segments if verdict is None), segments[-1][0])
    verified = Abstained("no-verifier") if right is None else Scored(right)
    return graded(sample, first_missing, start, finish, segments=tuple(judged), verified=verified)


def stage(kind: str, **changes):
    tree = {
        "directory": "d",
        "policy": {"model": "m"},
        "judge": {"model": "j"},
        "stages": [{"kind": kind, "name": "a", "steps": 3, "problems": {"source": "x"}} | changes],
    }
    return check_config(tree, "test").stages[0]
