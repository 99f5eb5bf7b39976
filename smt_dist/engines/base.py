"""Define the interface of an engine, and the values that it takes and returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class EngineOptions(NamedTuple):
    """Hold what an engine is made from.

    Attributes:
        name: one of :data:`smt_dist.engines.ENGINES`.
        reduce_dtype: ddp, fsdp2: in which the blocks' gradients cross the network.
        replicas: fsdp2: of the sharded base.
        cpu_offload: fsdp2: keep the frozen base's shards in host memory.
        units: fsdp2: what is gathered at once, one of :data:`smt_dist.engines.fsdp2_units.UNITS`.
        prefetch: fsdp2: gather the next unit of the backward while one computes.
        micro_batches: fsdp2: backwards in a step, if it is known.
        deepspeed: the DeepSpeed JSON with every ``"auto"`` filled in.
    """

    name: str
    reduce_dtype: torch.dtype = torch.float32
    replicas: int = 1
    cpu_offload: bool = False
    units: str = "auto"
    prefetch: bool = True
    micro_batches: int | None = None
    deepspeed: dict[str, Any] | None = None


class BlockState(NamedTuple):
    """Hold one module's part of the training state, whole, on the CPU.

    Attributes:
        module: its name.
        delta: fp32 master ``[blocks * block_rows, block_cols]``.
        moments: optimizer state's name -> fp32 tensor of the same shape; empty before the first step.
    """

    module: str
    delta: torch.Tensor
    moments: dict[str, torch.Tensor]


class Moments(NamedTuple):
    """Hold the optimizer's state, to be read module by module.

    Attributes:
        names: of its elementwise states, such as ``exp_avg``; empty before the first step.
        counters: what it counts for all elements alike, such as ``step``.
        tensors: (module, name -> fp32 tensor of the block's shape on the CPU); collective, so every rank iterates.
    """

    names: list[str]
    counters: dict[str, int | float]
    tensors: Iterator[tuple[str, dict[str, torch.Tensor]]]


class Tuning(NamedTuple):
    """Hold the functions that train one micro-batch.

    Attributes:
        forward: keyword inputs -> model outputs.
        backward: takes the loss.
        step: ends the micro-batch; at the end of a global step it moves the weights, if anything does.
    """

    forward: Callable[..., Any]
    backward: Callable[[torch.Tensor], Any]
    step: Callable[[], Any]


class Engine(Protocol):
    """Define the interface of an engine.

    All methods are collective unless they say otherwise, iterators while they iterate.

    ``optimizer`` is what :meth:`make_optimizer` made and accelerate wrapped; None before training.
    """

    name: str

    def load_options(self, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        """Return keywords for ``from_pretrained`` that shard the base while it is read.

        The weights are of ``dtype``.
        """

    def prepare_base(self, model: nn.Module) -> None:
        """Prepare a base that was loaded with these options for its first forward; not collective."""

    def scoring(self, model: nn.Module) -> AbstractContextManager[None]:
        """Make forwards and backwards of the bare ``model`` possible, without an optimizer."""

    def forget(self, model: nn.Module) -> None:
        """Remove what a destroyed training engine left in ``model``."""

    def full_finetuning(
        self, model: nn.Module, learning_rate: float, accumulation: int
    ) -> AbstractContextManager[Tuning]:
        """Train all weights with AdamW inside the context, without clipping.

        Gradients are averaged over ranks.

        Args:
            model: moved in place.
            learning_rate: constant.
            accumulation: micro-batches a global step.
        """

    def make_optimizer(
        self,
        groups: list[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        options: dict[str, Any],
        may_be_idle: bool = False,
        model: nn.Module | None = None,
    ) -> torch.optim.Optimizer:
        """Make the optimizer of the blocks.

        Args:
            groups: parameter groups of blocks.
            optimizer_class: an elementwise one (:func:`smt_dist.engines.elementwise.refuse_unless_elementwise`).
            options: its keyword arguments.
            may_be_idle: some blocks may get no gradient on some ranks (:func:`smt_dist.sparse.targets.may_be_idle`).
            model: that has the blocks.
        """

    def read_blocks(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (module, fp32 master on the CPU) in the model's order."""

    def write_blocks(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, deltas: Mapping[str, torch.Tensor]
    ) -> None:
        """Set masters and the parameters that compute; every rank gives the same."""

    def read_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        """Return the optimizer's state, in the model's order."""

    def write_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        states: Iterator[BlockState],
        counters: dict[str, int | float],
    ) -> None:
        """Put back masters, moments and counters, module by module; every rank gives the same."""

    def damaged_block(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
        """Return a module whose values on this rank aren't the rounding of their masters.

        Not collective, unlike the other methods.

        None where all are, and where the engine can't tell without the other ranks.
        """

    def memory_bytes(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        """Return bytes on this rank by kind.

        ``masters``, ``moments`` (0 before the first step), and others that the engine has.
        """


def unwrapped(optimizer: torch.optim.Optimizer) -> Any:
    """Return the engine's optimizer from accelerate's wrapper."""
    while type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer
