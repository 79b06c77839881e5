"""The policy in Megatron-Core: the interface between the training loop and Megatron."""

import gc
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer

from exprl_megatron.algorithms.batch import SampleOrOutline, replays_routing
from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.errors import GradientNotFinite, UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.flops import sequence_flops
from exprl_megatron.models.routing import Routing
from exprl_megatron.policy import overlap, step
from exprl_megatron.policy.balance import weight_balance_loss_by_tokens
from exprl_megatron.policy.host_memory import HostMemory, host_copies, storages_of
from exprl_megatron.policy.huggingface import initialize, load_huggingface, save_huggingface
from exprl_megatron.policy.megatron_loading import is_converted, load_converted
from exprl_megatron.policy.model import build_chunks
from exprl_megatron.policy.named_weights import named_weights
from exprl_megatron.policy.optimizer import build_optimizer, set_learning_rates
from exprl_megatron.policy.packing import MicroBatchPlan, PackingShape, padding_share, plan_micro_batches, shape_of
from exprl_megatron.policy.schedule import learning_rate
from exprl_megatron.policy.world import current_world


@dataclass(frozen=True)
class UpdateStats:
    """Statistics of an optimizer step."""

    grad_norm: float
    """Global, before clipping."""
    learning_rate: float
    skipped: bool
    """Whether Megatron skipped the step."""


@dataclass
class StageState:
    """State that exists for the duration of a stage."""

    config: OptimizerConfig
    optimizer: MegatronOptimizer
    total_steps: int
    updates: int
    ref_weights: list[dict[str, torch.Tensor]] | None
    """Weights of the reference policy, in host memory, by parameter name for each chunk; None: not kept."""


class Policy:
    """This rank's part of the policy. Every rank calls the same methods with the same arguments in the same order.

    Needs the process groups of the config's layout (see enter_world). The model is a directory in Hugging Face format;
    with `initialize: random` its weights are drawn from `seed`, the same for every layout, instead of read.
    Raises UserError where the layout does not fit the model, or the directory lacks a part of it.
    """

    def __init__(self, config: PolicyConfig, seed: int):
        self.config = config
        self.seed = seed
        self.world = current_world(config.layout)
        self.architecture = read_architecture(config.model)
        self.chunks = build_chunks(self.architecture, config, self.world)
        self.stage: StageState | None = None
        self._wrapped: list[DistributedDataParallel] = []
        self.host_weights = HostMemory(self.world.device)
        """Host memory for the weights while the device has other weights, or none."""
        if config.initialize == "random":
            initialize(self.chunks, self.architecture, self.world, seed)
        elif is_converted(config.model):
            load_converted(self.chunks, self.architecture, config.model)
        else:
            load_huggingface(self.chunks, self.architecture, self.world, config.model)

    @property
    def hf_config(self) -> dict:
        """Content of the model's config.json."""
        return json.loads((Path(self.config.model) / "config.json").read_text(encoding="utf-8"))

    def begin_stage(self, optimizer: OptimizerConfig, total_steps: int, keep_ref_policy: bool = False) -> None:
        """Make a new optimizer and schedule for the current weights; `total_steps` is the stage's number of updates.

        `keep_ref_policy` keeps a copy of the current weights in host memory as the reference policy.
        """
        if self.stage is not None:
            # Optimizers are in reference cycles: without this the old one would keep its memory.
            self.stage = None
            gc.collect()
        self._wrap(optimizer)
        ref_weights = self._host_copies() if keep_ref_policy else None
        self.stage = StageState(optimizer, build_optimizer(optimizer, self._wrapped), total_steps, 0, ref_weights)
        self._zero_grad()

    def log_probs(
        self, samples: Sequence[SampleOrOutline], temperature: float, ref_policy: bool = False
    ) -> list[np.ndarray]:
        """Compute the log-probs [response tokens], float32, of every sample; returns all of them on every rank.

        Logits are divided by `temperature`. `ref_policy` takes the reference policy's weights, not the current ones,
        and its routers choose: what the sampling server chose is the current policy's.
        """
        if not samples:
            return []
        self._check(samples)
        plan, work = self._plan(samples, replay=not ref_policy)
        with self._ref_weights() if ref_policy else nullcontext():
            collected = step.forward_log_probs(
                self._model(), work, self.config, self.architecture.vocabulary, temperature
            )
        return step.share_log_probs(samples, plan, collected, self.world)

    def owners(self, samples: Sequence[SampleOrOutline]) -> list[int]:
        """Return the data-parallel rank that learns from each sample; other ranks need only its outline."""
        owners = [0] * len(samples)
        for rank, micros in enumerate(self._micro_batch_plan(samples, self._shape())):
            for index in chain.from_iterable(micros):
                owners[index] = rank
        return owners

    def accumulate(
        self,
        samples: Sequence[SampleOrOutline],
        loss_fn: step.LossFunction,
        temperature: float,
        denominator: float,
        more_follow: bool = False,
    ) -> dict[str, float]:
        """Add the gradients of (sum of losses over all samples) / `denominator` to the buffers, for apply_update.

        Returns the metrics of `loss_fn`, summed over all samples (maxima where a name ends in `/max`), and the fraction
        of computed tokens that are padding: `padding/padded` for samples padded to the longest of their
        micro-batch, `padding/packed` for packed ones, both whatever the config says. The result is the same on every
        rank. How samples are divided over ranks and micro-batches changes only rounding. `more_follow` must be True
        in all calls before apply_update except the last: an optimizer with `overlap` reduces gradients in the last one.
        """
        self._stage()
        self._check(samples)
        _, work = self._plan(samples, replay=True)
        if self.architecture.experts and self.config.moe_aux_loss:
            weight_balance_loss_by_tokens(self.chunks, work.computed_tokens)
        with overlap.no_grad_sync(self._wrapped) if more_follow else nullcontext():
            collected = step.forward_backward(
                self._model(), work, self.config, self.architecture.vocabulary, temperature, loss_fn, denominator
            )
        return step.global_metrics(collected, self.world) | self._padding(samples)

    def apply_update(self, gradient_scale: float = 1.0) -> UpdateStats:
        """Take an optimizer step on the accumulated gradients times `gradient_scale`, clipped to the global norm, and
        zero the gradients. The scale is the same on every rank.

        Raises:
            GradientNotFinite: the norm is not finite; weights are unchanged and gradients zero.
        """
        stage = self._stage()
        finalize_model_grads(self._wrapped)
        if gradient_scale != 1:
            for chunk in self._wrapped:
                chunk.scale_gradients(gradient_scale)
        stage.optimizer.prepare_grads()
        grad_norm = float(stage.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            self._zero_grad()
            raise GradientNotFinite(f"The gradient norm of update {stage.updates + 1} is {grad_norm}")
        rate = learning_rate(stage.config, stage.updates, stage.total_steps)
        set_learning_rates(stage.optimizer, stage.config, rate)
        done, _, _ = stage.optimizer.step()
        stage.updates += 1
        self._zero_grad()
        return UpdateStats(grad_norm, rate, skipped=not done)

    def save_huggingface(self, directory: str | Path) -> None:
        """Write the current weights as a model directory in Hugging Face format."""
        self.gather_weights()
        save_huggingface(self.chunks, self.architecture, self.world, self.config.model, directory)

    def gather_weights(self) -> None:
        """Wait until this rank's parameters have the last update; a collective, needed before direct reads."""
        overlap.gather_weights(self._wrapped)

    def weight_storages(self) -> list[torch.UntypedStorage]:
        """Return the storages of the weights on the device, each once; they stay the same during a stage."""
        return storages_of(parameter for chunk in self.chunks for parameter in chunk.parameters())

    @property
    def wrapped(self) -> list[DistributedDataParallel]:
        """The model chunks wrapped in Megatron's DDP; empty before the first stage."""
        return self._wrapped

    def _model(self) -> list[torch.nn.Module]:
        return list(self._wrapped or self.chunks)

    def _stage(self) -> StageState:
        if self.stage is None:
            raise RuntimeError("the policy learns within a stage; call begin_stage first")
        return self.stage

    def _zero_grad(self) -> None:
        for chunk in self._wrapped:
            chunk.zero_grad_buffer()
        self._stage().optimizer.zero_grad()

    def _plan(self, samples: Sequence[SampleOrOutline], replay: bool) -> tuple[MicroBatchPlan, step.MicroBatches]:
        """Plan the micro-batches of all ranks, and build those of this rank.

        `replay`: with the experts that the samples carry, if they do and the config does not say otherwise.
        """
        shape = self._shape()
        plan = self._micro_batch_plan(samples, shape)
        replay = replay and self.config.router_replay is not False and replays_routing(samples)
        routing = Routing.of(self.architecture) if replay else None
        own = None
        if routing is not None:
            own = routing, routing.layers_of_stages(self.architecture, self.config.layout)[self.world.pp_rank]
        return plan, step.MicroBatches(samples, plan, shape, self.world, own)

    def _shape(self) -> PackingShape:
        return shape_of(self.config, self.world.device.type == "cuda")

    def _micro_batch_plan(self, samples: Sequence[SampleOrOutline], shape: PackingShape) -> MicroBatchPlan:
        layout = self.config.layout
        lengths = tuple(map(len, samples))
        return _cached_plan(
            lengths,
            ranks=layout.dp,
            budget=self.config.micro_batch_tokens,
            shape=shape,
            # Interleaved pipelines need as many micro-batches as stages at a time.
            group=layout.pp if layout.vpp > 1 else 1,
            # A longer sequence has more operations per token, as far as its layers see all of it.
            work=tuple(sequence_flops(self.architecture, lengths)),
        )

    def _padding(self, samples: Sequence[SampleOrOutline]) -> dict[str, float]:
        lengths = [len(sample) for sample in samples]
        shares = {}
        for name, packed in (("padded", False), ("packed", True)):
            shape = shape_of(self.config, self.world.device.type == "cuda", packed)
            shares[f"padding/{name}"] = padding_share(lengths, self._micro_batch_plan(samples, shape), shape)
        return shares

    def _check(self, samples: Sequence[SampleOrOutline]) -> None:
        longest = max(map(len, samples))
        if longest > self.config.max_tokens:
            raise UserError(
                f"A sequence has {longest} tokens, more than policy.max_tokens ({self.config.max_tokens}); raise it."
            )
        if not all(sample.prompt_tokens for sample in samples):
            raise ValueError("a sequence has no prompt: its first response token would have no log-prob")

    def _wrap(self, optimizer: OptimizerConfig) -> None:
        """Wrap the chunks in Megatron's DDP, as the optimizer needs it."""
        if self._wrapped:
            if overlap.is_wrapped_for(self._wrapped, optimizer):
                return
            # The buffers and hooks of a wrapper cannot be removed from a model: build it again.
            weights = self._host_copies()
            self._wrapped, self.chunks = [], []
            # A trainer process has left the first model out of collections.
            gc.unfreeze()
            gc.collect()
            self.chunks = build_chunks(self.architecture, self.config, self.world)
            self._set_weights(weights)
        self._wrapped = overlap.wrap(self.chunks, optimizer)

    @contextmanager
    def _ref_weights(self) -> Iterator[None]:
        """Put the weights of the reference policy into the model, and the current ones back at the end."""
        ref_weights = self._stage().ref_weights
        if ref_weights is None:
            raise RuntimeError("the reference policy was not kept; call begin_stage with keep_ref_policy=True")
        self.gather_weights()
        weights = self.weight_storages()
        self.host_weights.copy_from(weights)
        self._set_weights(ref_weights)
        try:
            yield
        finally:
            self.host_weights.copy_to(weights)

    def _host_copies(self) -> list[dict[str, torch.Tensor]]:
        """Copy the current weights to host memory, by name for each chunk."""
        self.gather_weights()
        named = [dict(named_weights(chunk)) for chunk in self.chunks]
        return [host_copies(parameters, self.world.device) for parameters in named]

    @torch.no_grad()
    def _set_weights(self, weights: list[dict[str, torch.Tensor]]) -> None:
        for chunk, values in zip(self.chunks, weights, strict=True):
            for name, weight in named_weights(chunk):
                weight.copy_(values[name], non_blocking=self.world.device.type == "cuda")


@lru_cache(maxsize=64)
def _cached_plan(lengths: tuple[int, ...], **limits) -> MicroBatchPlan:
    """Plan micro-batches; cached, since all passes of an update over the same samples share a plan."""
    return plan_micro_batches(lengths, **limits)
