"""A run under random faults of its servers and of itself, and whether it learned what it should have all the same."""

import asyncio
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from exprl_megatron.benchmarks.fault_proxy import FaultProxy, Mode
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import RunStopped, ServerError
from exprl_megatron.problems.order import problem_indices
from exprl_megatron.problems.sources import load_problems
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keeper import Keeper
from exprl_megatron.serving.keys import authorization
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.router import JUDGE_ROUTER, ROUTER
from exprl_megatron.training.directory import RunDirectory
from exprl_megatron.training.journal import Journal
from exprl_megatron.training.launch import wanted_servers
from exprl_megatron.training.ranks import TrainerRanks

_POLL_S = 0.1
_OF_A_SYNC = "POST /update_weights_from"


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    kind: str
    step: int
    """The steps that were learned when it was over."""
    ended: list[str]
    """What the run stopped with, before it was resumed; empty where it went on."""
    restarted: bool
    """Whether a server was started anew before the next step was learned."""
    seconds: float
    """From its end until the next step was learned."""


class ProxiedRegistry(Registry):
    """Registers servers under the addresses of proxies in front of them, which stay the same."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.proxies: dict[str, FaultProxy] = {}
        self.starts: dict[str, int] = {}
        """How often each has become ready."""

    def register(self, server: RegisteredServer) -> None:
        address = urlsplit(server.url)
        if server.name not in self.proxies:
            self.proxies[server.name] = FaultProxy()
        proxy = self.proxies[server.name]
        proxy.target = (address.hostname, address.port)
        self.starts[server.name] = self.starts.get(server.name, 0) + 1
        super().register(replace(server, url=proxy.url))


class FaultedRun:
    """Keeps a run's servers and its ranks, as `exprl train` does, and throws faults; `with` ends all of it."""

    def __init__(self, config: RunConfig, seed: int = 0, longest_s: float = 30.0):
        """A server misbehaves for at most `longest_s`."""
        self.config = config
        self.longest_s = longest_s
        self._over = True
        self._stops: list[str] = []
        self.paths = RunDirectory(config.directory)
        self.registry = ProxiedRegistry(self.paths.registry)
        self._random = random.Random(seed)
        self._claim = self.paths.claim(config, resume=False)
        self._specs = wanted_servers(config, self.paths)
        self.keeper = Keeper(self._specs, self.registry)
        self._ranks: TrainerRanks | None = None
        judge = config.judge.server
        self.kinds: dict[str, Callable[[], None]] = {
            "a sampling server is killed": lambda: self._kill(self._any("policy")),
            "the judge is killed": lambda: self._kill(self._any("judge")),
            "a sampling server hangs": lambda: self._misbehave("policy", "hang"),
            "the judge hangs": lambda: self._misbehave("judge", "hang"),
            "a sampling server answers 500": lambda: self._misbehave("policy", "refuse"),
            "the judge answers 500": lambda: self._misbehave("judge", "refuse"),
            "a sampling server has old weights": self._bring_old_weights,
            "a sampling server is killed in a weight update": lambda: self._at_next_sync(self._kill),
            **({"the router is killed": partial(self._kill, ROUTER)} if config.server.router else {}),
            **({"the judge's router is killed": partial(self._kill, JUDGE_ROUTER)} if judge.router else {}),
            "the trainer is killed": self._kill_trainer,
            "the trainer is killed in a weight update": lambda: self._at_next_sync(lambda name: self._kill_trainer()),
        }

    def __enter__(self) -> "FaultedRun":
        self.keeper.start()
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ranks.stop()
        self.keeper.stop()
        for proxy in self.registry.proxies.values():
            proxy.close()
        self._claim.release()

    def learned(self) -> int:
        """The steps that are in the metrics."""
        return self.paths.metrics.read_text().count("\n") if self.paths.metrics.is_file() else 0

    def until(self, condition: Callable[[], bool], deadline_s: float) -> None:
        """Tend to everything until `condition` holds or the run is done; a run that stopped is resumed.

        Raises TimeoutError after `deadline_s`, and ServerError where a server cannot be kept.
        """
        deadline = time.monotonic() + deadline_s
        while not condition():
            self.keeper.tend()
            try:
                if not self._ranks.running():
                    return
            except RunStopped as stopped:
                self._stops.append(str(stopped).partition("\n")[0])
                self._ranks.stop()
                self._begin()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {deadline_s:g} s")
            time.sleep(_POLL_S)

    def throw(self, kind: str, deadline_s: float) -> Outcome:
        """One fault, however long it lasts, and all that follows until the next step is learned."""
        starts, stops = dict(self.registry.starts), len(self._stops)
        self._over = False
        self.kinds[kind]()
        self.until(lambda: self._over, deadline_s)
        begun, step = time.monotonic(), self.learned()
        self.until(lambda: self.learned() > step, deadline_s)
        return Outcome(kind, step, self._stops[stops:], starts != self.registry.starts, time.monotonic() - begun)

    def pause(self, most_s: float) -> None:
        """Let the run go on for a random time."""
        until = time.monotonic() + self._random.uniform(0.0, most_s)
        self.until(lambda: time.monotonic() > until, 10 * most_s + 60)

    def choose(self, weights: dict[str, float]) -> str:
        """A kind of fault by chance."""
        return self._random.choices(list(weights), list(weights.values()))[0]

    def _begin(self) -> None:
        self._ranks = TrainerRanks(self.paths, self.config, self.registry.directory)

    def _any(self, kind: str) -> str:
        return self._random.choice(sorted(name for name in self.registry.proxies if name.startswith(kind)))

    def _kill(self, name: str) -> None:
        """kill -9 of a server, not of its supervisor; nothing where it is down already."""
        server = self.keeper.server(name)
        for process in psutil.Process(server.pid).children() if server.alive() else []:
            process.kill()
        self._over = True

    def _misbehave(self, kind: str, mode: Mode) -> None:
        """A server's proxy behaves so for a while."""
        proxy = self.registry.proxies[self._any(kind)]
        proxy.mode = mode
        self.pause(self.longest_s)
        proxy.mode = "pass"
        self._over = True

    def _bring_old_weights(self) -> None:
        """A server gets the weights that it started with, behind the run's back."""
        name = self._any("policy")
        host, port = self.registry.proxies[name].target

        async def bring() -> None:
            key = authorization(self.registry.key_file)
            async with SGLangClient(f"http://{host}:{port}", name, deadline_s=60.0, headers=key) as client:
                await client.update_from_disk(self.config.policy.model, "initial")

        self._over = True
        try:
            asyncio.run(bring())
        except ServerError as refused:
            print(f"{name} did not take old weights: {str(refused).partition(chr(10))[0]}", flush=True)

    def _at_next_sync(self, act: Callable[[str], None]) -> None:
        """`act` when the next request of a weight update is on its way to some server."""
        name = self._any("policy")
        proxy = self.registry.proxies[name]

        def heard(line: str) -> None:
            if line.startswith(_OF_A_SYNC):
                proxy.on_request = lambda line: None
                act(name)

        proxy.on_request = heard

    def _kill_trainer(self) -> None:
        for pid in self._ranks.pids:
            for worker in psutil.Process(pid).children() if psutil.pid_exists(pid) else []:
                worker.kill()
        self._over = True


def wrong_with(config: RunConfig) -> list[str]:
    """What a finished run of one strictly on-policy stage has lost, counted twice, or learned from wrong weights."""
    (stage,) = config.stages
    paths = RunDirectory(config.directory)
    logged = [json.loads(line)["step"] for line in paths.metrics.read_text().splitlines()]
    found = [] if logged == list(range(1, stage.steps + 1)) else [f"steps learned: {logged}"]
    problems, journal = load_problems(stage.problems), Journal(paths.journal)
    for step in range(1, stage.steps + 1):
        sampled = journal.read(stage.name, step)
        first = (step - 1) * stage.problems_per_step
        indices = problem_indices(config.seed, stage.name, first, stage.problems_per_step, len(problems))
        if [group.problem_id for group in sampled.groups] != [problems[i].id for i in indices]:
            found.append(f"step {step} has other problems than its own")
        for group in sampled.groups:
            traces = [member.trace for member in group.members]
            if [trace.sample for trace in traces] != list(range(stage.group_size)):
                found.append(f"step {step}, {group.problem_id}: samples {[trace.sample for trace in traces]}")
            expected = f"v{(step - 1) * stage.updates_per_step}"
            wrong = {version for trace in traces for version, _, _ in trace.weight_versions} - {expected}
            covered = all(trace.weight_versions[-1][2] == len(trace.token_ids) for trace in traces)
            if wrong or not covered:
                found.append(f"step {step}, {group.problem_id}: weights {sorted(wrong)} instead of {expected}")
    return found
