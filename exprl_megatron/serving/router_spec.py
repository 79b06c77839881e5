"""Routers in front of a run's servers: how they are started."""

import sys
from dataclasses import dataclass

from exprl_megatron.serving.server_spec import ServerSpec
from exprl_megatron.utils.ports import LOCAL, free_ports

ROUTER = "router-0"
"""In front of the sampling servers."""
JUDGE_ROUTER = "router-1"


@dataclass(frozen=True)
class RouterSpec(ServerSpec):
    """One router to start, without workers; `config` is that of the servers behind it."""

    def command(self, port: int) -> list[str]:
        """Return the arguments of sglang-router, which neither retries nor removes servers: its clients do."""
        (metrics,) = free_ports(1, {port})
        command = [sys.executable, "-m", "exprl_megatron.serving.keyed_router", "--host", LOCAL, "--port", str(port)]
        command += ["--policy", "cache_aware", "--disable-retries", "--disable-circuit-breaker", "--log-level", "warn"]
        command += ["--health-check-interval-secs", "5", "--worker-startup-check-interval", "1"]
        command += ["--request-timeout-secs", str(int(self.config.request_deadline_s) + 1)]
        return [*command, "--prometheus-host", LOCAL, "--prometheus-port", str(metrics)]

    def check(self) -> None:
        """Check nothing: a router needs no model."""
