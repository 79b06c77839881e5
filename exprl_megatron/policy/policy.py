"""The model that learns: all that the training loop asks of Megatron."""

import gc
import json
import math
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer

from exprl_megatron.algorithms.batch import LearnedFrom
from exprl_megatron.config.policy import OptimizerConfig, PolicyConfig
from exprl_megatron.errors import GradientNotFinite, UserError
from exprl_megatron.models.architecture import read_architecture
from exprl_megatron.models.flops import attention_flops, layer_flops
from exprl_megatron.policy import overlap, step
from exprl_megatron.policy.balance import weigh_balance_by_tokens
from exprl_megatron.policy.host_memory import HostMemory, host_copies, storages_of
from exprl_megatron.policy.huggingface import initialise, load_huggingface, save_huggingface
from exprl_megatron.policy.megatron_loading import is_converted, load_converted
from exprl_megatron.policy.model import build_chunks
from exprl_megatron.policy.optimizer import build_optimizer, set_rates
from exprl_megatron.policy.packing import Plan, Shape, padding_share, plan_micro_batches, shape_of
from exprl_megatron.policy.schedule import learning_rate
from exprl_megatron.policy.world import current_world


@dataclass(frozen=True)
class UpdateStats:
    """What an optimizer step did."""

    grad_norm: float
    """Global, before clipping."""
    learning_rate: float
    skipped: bool
    """True where Megatron refused the step."""


@dataclass
class StageState:
    """What lives as long as a stage does."""

    config: OptimizerConfig
    optimizer: MegatronOptimizer
    total_steps: int
    updates: int
    start: list[dict[str, torch.Tensor]] | None
    """The stage's starting weights, in host memory, by parameter name for each chunk; None: not kept."""


class Policy:
    """This rank's part of the policy. Every rank calls the same methods with the same arguments in the same order.

    Needs a world (see enter_world) for the config's layout. The model is a directory in Hugging Face form;
    with `initialise: random` its weights are not read but drawn from `seed`, the same for every layout.
    Raises UserError where the layout cannot hold the model, or the directory does not hold it.
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
        """Where the weights wait while the device has others, or none."""
        if config.initialise == "random":
            initialise(self.chunks, self.architecture, self.world, seed)
        elif is_converted(config.model):
            load_converted(self.chunks, self.architecture, config.model)
        else:
            load_huggingface(self.chunks, self.architecture, self.world, config.model)

    @property
    def hf_config(self) -> dict:
        """The model's config.json."""
        return json.loads((Path(self.config.model) / "config.json").read_text(encoding="utf-8"))

    def begin_stage(self, optimizer: OptimizerConfig, total_steps: int, keep_start: bool = False) -> None:
        """A fresh optimizer and schedule on the current weights; `total_steps` counts calls of apply_update.

        `keep_start` keeps a copy of the current weights in host memory, for log_probs(start=True).
        """
        if self.stage is not None:
            # Optimizers are in reference cycles: without this the former one keeps its memory beside the new one.
            self.stage = None
            gc.collect()
        self._wrap(optimizer)
        start = self._host_copies() if keep_start else None
        self.stage = StageState(optimizer, build_optimizer(optimizer, self._wrapped), total_steps, 0, start)
        self._zero_grad()

    def log_probs(self, sequences: ListLike[LearnedFrom], temperature: float, start: bool = False) -> list[np.ndarray]:
        """The log-probs [response tokens], float32, of all `sequences`, on every rank, logits divided by `temperature`.

        `start` takes the stage's starting weights instead of the current ones.
        """
        if not sequences:
            return []
        self._check(sequences)
        plan, work = self._plan(sequences)
        with self._starting_weights() if start else nullcontext():
            collected = step.forward_log_probs(
                self._model(), work, self.config, self.architecture.vocabulary, temperature
            )
        return step.share_log_probs(sequences, plan, collected, self.world)

    def owners(self, sequences: ListLike[LearnedFrom]) -> list[int]:
        """The data-parallel rank that learns from each of `sequences`; other ranks need only their outlines."""
        owners = [0] * len(sequences)
        for rank, micros in enumerate(self._spread(sequences, self._shape())):
            for index in chain.from_iterable(micros):
                owners[index] = rank
        return owners

    def accumulate(
        self,
        sequences: ListLike[LearnedFrom],
        loss_fn: step.LossFunction,
        temperature: float,
        denominator: float,
        more_follow: bool = False,
    ) -> dict[str, float]:
        """Adds the gradients of (sum of losses over all sequences) / denominator; they wait for apply_update.

        Returns the metrics of `loss_fn` summed over everything (maxima where a name ends in `/max`), and the share
        of the model's tokens that are padding: `padding/padded` where sequences are padded to the longest of their
        micro-batch, `padding/packed` where they are packed, whatever the config says. The same on every rank. How
        sequences are spread over ranks and micro-batches changes nothing but rounding. `more_follow` must be said
        of all calls but the last before apply_update: an optimizer with `overlap` reduces gradients in the last.
        """
        self._stage()
        self._check(sequences)
        _, work = self._plan(sequences)
        if self.architecture.experts and self.config.moe_aux_loss:
            weigh_balance_by_tokens(self.chunks, work.computed_tokens)
        with overlap.reductions_wait(self._wrapped) if more_follow else nullcontext():
            collected = step.forward_backward(
                self._model(), work, self.config, self.architecture.vocabulary, temperature, loss_fn, denominator
            )
        return step.global_metrics(collected, self.world) | self._padding(sequences)

    def apply_update(self, gradient_scale: float = 1.0) -> UpdateStats:
        """One optimizer step on the accumulated gradients times `gradient_scale`, clipped to the config's global norm;
        zeroes them. The scale is the same on every rank.

        Raises GradientNotFinite, with the weights as they were and no gradients, where the norm is not finite.
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
        set_rates(stage.optimizer, stage.config, rate)
        done, _, _ = stage.optimizer.step()
        stage.updates += 1
        self._zero_grad()
        return UpdateStats(grad_norm, rate, skipped=not done)

    def save_huggingface(self, directory: str | Path) -> None:
        """Writes the current weights as a model directory; see policy.huggingface."""
        self.gather_weights()
        save_huggingface(self.chunks, self.architecture, self.world, self.config.model, directory)

    def gather_weights(self) -> None:
        """Waits until this rank's chunks have all of the last update; a collective, before they are read directly."""
        overlap.gather_weights(self._wrapped)

    def weight_storages(self) -> list[torch.UntypedStorage]:
        """The memory of the weights on the device, each piece once; the same pieces as long as a stage lasts."""
        return storages_of(parameter for chunk in self.chunks for parameter in chunk.parameters())

    @property
    def wrapped(self) -> list[DistributedDataParallel]:
        """The chunks in Megatron's data parallelism; none before the first stage."""
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

    def _plan(self, sequences: ListLike[LearnedFrom]) -> tuple[Plan, step.MicroBatches]:
        """Where each sequence goes, and this rank's micro-batches."""
        shape = self._shape()
        plan = self._spread(sequences, shape)
        return plan, step.MicroBatches(sequences, plan, shape, self.world)

    def _shape(self) -> Shape:
        return shape_of(self.config, self.world.device.type == "cuda")

    def _spread(self, sequences: ListLike[LearnedFrom], shape: Shape) -> Plan:
        layout = self.config.layout
        return _kept_plan(
            tuple(map(len, sequences)),
            ranks=layout.dp,
            budget=self.config.micro_batch_tokens,
            shape=shape,
            # Interleaved pipelines need as many micro-batches as stages at a time.
            group=layout.pp if layout.vpp > 1 else 1,
            # Attention's operations per token grow with the sequence; the matrices' do not.
            parity=layer_flops(self.architecture) / attention_flops(self.architecture, sequence_length=1),
        )

    def _padding(self, sequences: ListLike[LearnedFrom]) -> dict[str, float]:
        lengths = [len(sequence) for sequence in sequences]
        shares = {}
        for name, packed in (("padded", False), ("packed", True)):
            shape = shape_of(self.config, self.world.device.type == "cuda", packed)
            shares[f"padding/{name}"] = padding_share(lengths, self._spread(sequences, shape), shape)
        return shares

    def _check(self, sequences: ListLike[LearnedFrom]) -> None:
        longest = max(map(len, sequences))
        if longest > self.config.max_tokens:
            raise UserError(
                f"A sequence has {longest} tokens, more than policy.max_tokens ({self.config.max_tokens}); raise it."
            )
        if not all(sequence.prompt_tokens for sequence in sequences):
            raise ValueError("a sequence has no prompt: its first response token would have no log-prob")

    def _wrap(self, optimizer: OptimizerConfig) -> None:
        """Puts the chunks into Megatron's data parallelism, as the optimizer needs it."""
        if self._wrapped:
            if overlap.is_wrapped_for(self._wrapped, optimizer):
                return
            # The buffers and hooks of the one kind cannot be taken off a model: build it again.
            weights = self._host_copies()
            self._wrapped, self.chunks = [], []
            gc.collect()
            self.chunks = build_chunks(self.architecture, self.config, self.world)
            self._set_weights(weights)
        self._wrapped = overlap.wrap(self.chunks, optimizer)

    @contextmanager
    def _starting_weights(self) -> Iterator[None]:
        """The stage's starting weights in the model's place."""
        start = self._stage().start
        if start is None:
            raise RuntimeError("the starting weights were not kept; call begin_stage with keep_start=True")
        self.gather_weights()
        weights = self.weight_storages()
        self.host_weights.copy_from(weights)
        self._set_weights(start)
        try:
            yield
        finally:
            self.host_weights.copy_to(weights)

    def _host_copies(self) -> list[dict[str, torch.Tensor]]:
        """The current weights by name, for each chunk."""
        self.gather_weights()
        named = [dict(chunk.named_parameters()) for chunk in self.chunks]
        return [host_copies(parameters, self.world.device) for parameters in named]

    @torch.no_grad()
    def _set_weights(self, weights: list[dict[str, torch.Tensor]]) -> None:
        for chunk, values in zip(self.chunks, weights, strict=True):
            for name, parameter in chunk.named_parameters():
                parameter.copy_(values[name], non_blocking=self.world.device.type == "cuda")


@lru_cache(maxsize=64)
def _kept_plan(lengths: tuple[int, ...], **limits) -> Plan:
    """All passes of a step over the same sequences share a plan; a step has two of them for each of its updates."""
    return plan_micro_batches(lengths, **limits)
