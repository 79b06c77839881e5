"""SGLang servers, how they sample, and how weights reach them."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from exprl_megatron.config.base import Config

SCORED_BELOW_ROOM = 7
"""A scored sequence must have at least this many tokens fewer than the server has positions, and than its KV cache has
slots: SGLang reserves slots for an answer even where none is requested (max_req_input_len in sglang/srt/managers)."""

RETURN_ROUTED_EXPERTS = "--enable-return-routed-experts"
"""SGLang's argument for a server that returns the experts that it chooses, to requests that ask for them."""

_OTHER_DIVISIONS = ("--ep", "--ep-size", "--expert-parallel-size", "--enable-dp-attention", "--moe-dense-tp-size")


class ServerConfig(Config):
    """One kind of SGLang server (policy or judge)."""

    count: PositiveInt = 1
    """Number of servers."""
    tp: PositiveInt = 1
    """Tensor-parallel size of each server."""
    port: int | None = Field(None, ge=1024, le=65535)
    """First port; server i takes port + i. None picks free ones."""
    max_total_tokens: PositiveInt | None = None
    """KV-cache slots; None lets SGLang fill the device (on a CPU: 65,536)."""
    max_running_requests: PositiveInt | None = None
    """Requests that a server decodes together; null: as SGLang decides."""
    mem_fraction_static: float | None = Field(None, gt=0, lt=1)
    """On a GPU: fraction of its memory for weights and KV cache. None: SGLang's choice, or 0.75 for sampling servers
    that are colocated with the trainer."""
    cpu_threads: PositiveInt = 1
    """Threads of each rank of a server on a machine without GPUs; slow where they are more than the free cores."""
    start_deadline_s: float = Field(600.0, gt=0)
    """Seconds that a server may take until it answers."""
    request_deadline_s: float = Field(600.0, gt=0)
    """Seconds that a request may take before another server is asked."""
    answer_deadline_s: float = Field(60.0, gt=0)
    """A sampling server that failed must answer a probe within this time before it receives requests again."""
    router: bool = False
    """Let sglang-router, started with the trainer, choose the server of each request, for sampling and for the judge.
    Behind a router the judge's stragglers are not hedged (`judge.hedge_after_s`)."""
    group_requests: bool = False
    """Of sampling servers: one request asks for all traces of a problem, so that none is graded before the last of them
    is finished. Less work for each trace, which counts where traces are short."""
    restarts: NonNegativeInt = 3
    """Number of restarts of a server that died or fails repeatedly; after the next failure the run stops."""
    extra_args: tuple[str, ...] = ()
    """Passed to `sglang.launch_server` as they are."""

    def violations(self, run_config) -> list[str]:
        return [
            f"A server's extra_args hold {name}, but the run makes the key of its servers itself; leave it out."
            for name in ("--api-key", "--admin-api-key")
            if name in self.extra_options
        ]

    @property
    def extra_options(self) -> frozenset[str]:
        """What is in front of any `=` in each of `extra_args`: names of options, and values given as arguments."""
        return frozenset(argument.partition("=")[0] for argument in self.extra_args)

    @property
    def names_attention_backend(self) -> bool:
        """Whether `extra_args` choose SGLang's attention kernels, instead of SGLang by GPU and model."""
        return "--attention-backend" in self.extra_options

    @property
    def divides_otherwise(self) -> bool:
        """Whether `extra_args` divide attention or experts over a server's ranks in another way than `tp` does."""
        return not self.extra_options.isdisjoint(_OTHER_DIVISIONS)

    @property
    def memory_share(self) -> float | None:
        """`mem_fraction_static`, or what `extra_args` give for it, which SGLang then takes; None: SGLang's choice."""
        words = [word for argument in self.extra_args for word in argument.split("=", 1)]
        given = [value for name, value in pairwise(words) if name == "--mem-fraction-static"]
        return float(given[-1]) if given else self.mem_fraction_static


class SamplingConfig(Config):
    """How traces are sampled."""

    temperature: float = Field(1.0, gt=0)
    """Divisor of the logits."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Share of the probability that tokens are sampled from."""
    top_k: int = -1
    """Number of tokens that are sampled from; -1: all."""
    max_new_tokens: PositiveInt = 1024
    """Longest response in tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a response, in addition to the model's own."""


class SyncConfig(Config):
    """How updated weights reach the sampling servers, and which checks follow."""

    transport: Literal["auto", "broadcast", "direct", "handles", "disk", "delta"] = "auto"
    """`auto` is `handles` where trainer and servers share GPUs, else `direct`, or `broadcast` where a server cannot
    receive by `direct`; docs/resharding.md describes each."""
    bucket_mb: float = Field(256.0, gt=0)
    """Size of a weight bucket in MiB (2**20 bytes); weights are sent in buckets, and a rank holds two of them."""
    fp8: bool = False
    """The servers hold matrices in FP8 blocks of 128 x 128 (DeepSeek-V3's format), and receive them in this format."""
    verify: bool = True
    """Compare the servers' checksums with the trainer's after every sync."""
    max_log_prob_gap: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = "auto"
    """Stop the run where mean |trainer - sampler| log-prob of a step exceeds this many nats a token. `auto` goes by
    precision and by what the first step showed (docs/config.md); null compares nothing."""
    pause_mode: Literal["retract", "in_place"] = "retract"
    """How traces in flight are paused for an update of the weights (`max_staleness`; SGLang's pause_generation modes):
    `retract` computes their KV cache again under the new weights, `in_place` continues with the old cache."""
    deadline_s: float = Field(600.0, gt=0)
    """Seconds that a weight sync may take."""

    def violations(self, run_config) -> list[str]:
        if self.fp8 and self.transport == "direct":
            return [
                "sync.transport is direct, which sends weights as the trainer holds them, but sync.fp8 is true; set "
                "transport to broadcast, or fp8 to false."
            ]
        return []
