"""A run under random faults of its servers and of itself, and whether it learned what it should have all the same."""

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks import strangers
from benchmarks.fault_proxy import FaultProxy, Mode
from benchmarks.garbage import garbled, is_sample
from benchmarks.learned import Replies, wrong_with
from exprl_megatron.config.run import RunConfig
from exprl_megatron.errors import RunStopped, ServerError
from exprl_megatron.launch.launcher import required_servers
from exprl_megatron.launch.ranks import TrainerRanks
from exprl_megatron.policy.checkpoint_files import DAMAGED, checkpoints
from exprl_megatron.processes.descendants import child_pids, existing
from exprl_megatron.runs.directory import RunDirectory
from exprl_megatron.serving.client import SGLangClient
from exprl_megatron.serving.keys import authorization
from exprl_megatron.serving.registry import RegisteredServer, Registry
from exprl_megatron.serving.router_spec import JUDGE_ROUTER, ROUTER
from exprl_megatron.serving.server_supervisor import ServerSupervisor

_POLL_S = 0.1
_OF_A_SYNC = "POST /update_weights_from"
_OF_A_SAMPLE = "POST /generate"
_GARBLED = 0.1
"""The share of a server's samples that are garbage while it misbehaves so."""
_GARBLED_WITHIN_S = 900.0
"""It may have to be started first."""
_FOUND_S = 60.0
"""Seconds within which a stopped rank is found."""


@dataclass(frozen=True)
class Outcome:
    """What became of one fault."""

    kind: str
    step: int
    """The steps that were learned when it was over."""
    ended: list[str]
    """What the run stopped with, before it was resumed; empty where it continued."""
    restarted: bool
    """Whether a server was restarted before the next step was learned."""
    seconds: float
    """From its end until the next step was learned."""


class ProxiedRegistry(Registry):
    """Registers servers under the addresses of proxies in front of them, which stay the same."""

    def __init__(self, directory: Path):
        super().__init__(directory)
        self.proxies: dict[str, FaultProxy] = {}
        self.starts: dict[str, int] = {}
        """How often each has become ready."""
        self.on_reply: Callable[[str, str, bytes], bytes] = lambda server, line, body: body
        """Of which server, to which request, what; returns what the client gets."""

    def register(self, server: RegisteredServer) -> None:
        address = urlsplit(server.url)
        if server.name not in self.proxies:
            self.proxies[server.name] = FaultProxy()
            self.proxies[server.name].on_reply = lambda line, body: self.on_reply(server.name, line, body)
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
        self._stopped_at: list[float] = []
        self._before_resume: Callable[[], None] = lambda: None
        self.paths = RunDirectory(config.directory)
        self.registry = ProxiedRegistry(self.paths.registry)
        self.registry.on_reply = self._replied
        self.replies = Replies()
        self.garbage: Counter[str] = Counter()
        """How often each kind of garbage was sent."""
        self._garbles: str | None = None
        """The server that does."""
        self._garbage_of = random.Random(seed)  # a proxy's thread asks it
        self._found: list[str] = []
        self.damaged: list[str] = []
        """The files of checkpoints that were damaged, and how."""
        self._random = random.Random(seed)
        self._claim = self.paths.claim(config, resume=False)
        self._specs = required_servers(config, self.paths)
        self.supervisor = ServerSupervisor(self._specs, self.registry)
        self._ranks: TrainerRanks | None = None
        judge, routed = config.judge.server, config.server.router
        self.kinds: dict[str, Callable[[], None]] = {
            "a sampling server is killed": lambda: self._kill(self._any("policy")),
            "the judge is killed": lambda: self._kill(self._any("judge")),
            "a sampling server hangs": lambda: self._misbehave("policy", "hang"),
            "the judge hangs": lambda: self._misbehave("judge", "hang"),
            "a sampling server answers 500": lambda: self._misbehave("policy", "refuse"),
            "the judge answers 500": lambda: self._misbehave("judge", "refuse"),
            "a sampling server replies garbage": lambda: self._garble("policy"),
            "the judge replies garbage": lambda: self._garble("judge"),
            "a sampling server gets requests without a key": lambda: self._intrude(self._any("policy")),
            "the judge gets requests without a key": lambda: self._intrude(self._any("judge")),
            "a sampling server has old weights": self._bring_old_weights,
            "a sampling server is killed in a weight update": lambda: self._at_next_sync(self._kill),
            **({"the router is killed": partial(self._kill, ROUTER)} if routed else {}),
            **({"the judge's router is killed": partial(self._kill, JUDGE_ROUTER)} if judge.router else {}),
            **({"the router gets requests without a key": partial(self._intrude, ROUTER)} if routed else {}),
            "the trainer is killed": self._kill_trainer,
            "the trainer is killed in a weight update": lambda: self._at_next_sync(lambda name: self._kill_trainer()),
            "a rank is stopped": self._stop_rank,
            "the newest checkpoint is damaged": self._damage_checkpoint,
        }

    def __enter__(self) -> "FaultedRun":
        self.supervisor.start()
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ranks.stop()
        self.supervisor.stop()
        for proxy in self.registry.proxies.values():
            proxy.close()
        self._claim.release()

    def learned(self) -> int:
        """Return the steps that are in the metrics."""
        return self.paths.metrics.read_text().count("\n") if self.paths.metrics.is_file() else 0

    def until(self, condition: Callable[[], bool], deadline_s: float) -> None:
        """Tend to everything until `condition` holds or the run is done; a run that stopped is resumed.

        Raises TimeoutError after `deadline_s`, and ServerError where a server cannot be kept.
        """
        deadline = time.monotonic() + deadline_s
        while not condition():
            self.supervisor.poll()
            try:
                if not self._ranks.running():
                    return
            except RunStopped as stopped:
                self._stops.append(str(stopped).partition("\n")[0])
                self._stopped_at.append(time.monotonic())
                self._ranks.stop()
                self._before_resume()
                self._begin()
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {deadline_s:g} s")
            time.sleep(_POLL_S)

    def throw(self, kind: str, deadline_s: float) -> Outcome:
        """Play one fault, however long it lasts, and all that follows until the next step is learned."""
        starts, stops = dict(self.registry.starts), len(self._stops)
        self._over = False
        self.kinds[kind]()
        self.until(lambda: self._over, deadline_s)
        began, step = time.monotonic(), self.learned()
        self.until(lambda: self.learned() > step, deadline_s)
        return Outcome(kind, step, self._stops[stops:], starts != self.registry.starts, time.monotonic() - began)

    def end(self) -> None:
        """End the ranks after the steps that are learned."""
        self._ranks.stop()

    def wrong(self) -> list[str]:
        """Return what is wrong with the run, which is done or ended: see wrong_with; and which faults were not found as
        they must.
        """
        aside = [path.name for path in self.paths.checkpoints.iterdir() if DAMAGED in path.name]
        loaded = [] if len(aside) == len(self.damaged) else [f"damaged: {self.damaged}, set aside: {sorted(aside)}"]
        return [*wrong_with(self.config, self.replies, self.learned()), *self._found, *loaded]

    def pause(self, most_s: float) -> None:
        """Let the run continue for a random time."""
        until = time.monotonic() + self._random.uniform(0.0, most_s)
        self.until(lambda: time.monotonic() > until, 10 * most_s + 60)

    def choose(self, weights: dict[str, float]) -> str:
        """Return a kind of fault by chance."""
        return self._random.choices(list(weights), list(weights.values()))[0]

    def _begin(self) -> None:
        self._ranks = TrainerRanks(self.paths, self.config, self.registry.directory)

    def _any(self, kind: str) -> str:
        return self._random.choice(sorted(name for name in self.registry.proxies if name.startswith(kind)))

    def _kill(self, name: str) -> None:
        """kill -9 of a server, not of its supervisor; nothing where it is down already."""
        server = self.supervisor.server(name)
        for process in existing(child_pids(server.pid)) if server.alive() else []:
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
        for worker in self._workers():
            worker.kill()
        self._over = True

    def _workers(self) -> list[psutil.Process]:
        return existing(worker for supervisor in self._ranks.pids for worker in child_pids(supervisor))

    def _stop_rank(self) -> None:
        """SIGSTOP for one rank, which its missing heartbeat shows."""
        worker, stops, started = self._random.choice(self._workers()), len(self._stops), time.monotonic()
        worker.send_signal(signal.SIGSTOP)
        self.until(lambda: len(self._stops) > stops, 10 * _FOUND_S)
        if (found_s := self._stopped_at[stops] - started) > _FOUND_S:
            self._found.append(f"a stopped rank was found after {found_s:.0f} s")
        self._over = True

    def _damage_checkpoint(self) -> None:
        """The trainer is killed, and before it is resumed a bit of its newest checkpoint flips, or a file is gone."""

        def damage() -> None:
            self._before_resume = lambda: None
            *before, newest = checkpoints(self.paths.checkpoints)
            if not before:
                return  # there would be nothing to continue from
            victim = self._random.choice(sorted(path for path in newest.iterdir() if path.is_file()))
            how = self._random.choice(("deleted", "flipped"))
            if how == "deleted":
                victim.unlink()
            else:
                content = bytearray(victim.read_bytes())
                content[self._random.randrange(len(content))] ^= 1 << self._random.randrange(8)
                victim.write_bytes(content)
            self.damaged.append(f"{newest.name}/{victim.name} {how}")
            print(self.damaged[-1], flush=True)

        self._before_resume = damage
        self._kill_trainer()

    def _intrude(self, name: str) -> None:
        """Requests without the run's key to a server itself, not to its proxy."""
        host, port = self.registry.proxies[name].target
        routes = strangers.ROUTER if name in (ROUTER, JUDGE_ROUTER) else strangers.SERVER
        self._over = True
        if self.supervisor.server(name).registered:
            answered = asyncio.run(strangers.let_in(f"http://{host}:{port}", routes))
            self._found += [f"{name} did as somebody without a key asked: {answer}" for answer in answered]

    def _garble(self, kind: str) -> None:
        """Some of a server's samples are garbage for a while, one at least."""
        self._garbles, sent = self._any(kind), self.garbage.total()
        self.pause(self.longest_s)
        self.until(lambda: self.garbage.total() > sent, _GARBLED_WITHIN_S)
        self._garbles = None
        self._over = True

    def _replied(self, server: str, line: str, body: bytes) -> bytes:
        if not line.startswith(_OF_A_SAMPLE) or not is_sample(body) or server in (ROUTER, JUDGE_ROUTER):
            return body
        self.replies.add(server, body)
        if server != self._garbles or self._garbage_of.random() >= _GARBLED:
            return body
        kind, garbage = garbled(body, self._garbage_of)
        self.garbage[kind] += 1
        return garbage
