"""A run of one rank made by its own constructor, with whatever a test puts in place of its parts."""

import asyncio
from types import SimpleNamespace

import pytest

from exprl_megatron.config.run import JournalConfig
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.runs.progress import RunProgress
from exprl_megatron.training import run as module
from exprl_megatron.training.run import RankZero, Run, ServerLinks

NO_CONFIG = SimpleNamespace(directory="nowhere", journal=JournalConfig())


class OneRank:
    """The coordinator of a run of one rank; `stop` asks the run to stop."""

    is_rank0 = True

    def __init__(self):
        self.stop = False

    def broadcast_from_rank0(self, work):
        return work()

    on_rank0 = broadcast_from_rank0

    def broadcast_run(self, start):
        return self.run(start())

    def run(self, coroutine):
        return asyncio.run(coroutine)

    def asked_to_stop(self):
        return self.stop


class OneRankOfResults(OneRank):
    """Where what is scripted gives results instead of coroutines."""

    def run(self, coroutine):
        return coroutine


class Silent:
    """In place of a logger; takes every call."""

    def __getattr__(self, name):
        return lambda *arguments, **settings: None


def scripted_run(
    config=NO_CONFIG, *, policy=None, coordinator=None, servers=None, rank_zero=None, progress=None, checkpoint=None
) -> Run:
    """`servers` has `phases` and `ref_scorer`, `rank_zero` rollouts, prefetch, evaluator and logger; all may lack."""
    links = {"sync": None, "phases": None, "ref_scorer": None} | (servers or {})
    with pytest.MonkeyPatch.context() as patch:
        # It makes process groups.
        patch.setattr(module, "SampleScatter", lambda policy: None)
        return Run(
            config,
            RunDirectory(config.directory),
            policy,
            coordinator,
            ServerLinks(**links),
            RankZero(**({"logger": Silent()} | (rank_zero or {}))),
            (progress or RunProgress(), checkpoint),
        )
