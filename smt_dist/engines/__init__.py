"""Engines: how the base is held, how a probe's backward runs, and who shards the blocks' optimizer state.

One file an engine. ``fsdp2`` gets its file here when it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from smt_dist.errors import SMTError

ENGINES = ("ddp", "deepspeed")


class BlockState(NamedTuple):
    """One module's part of the training state, whole, on the CPU.

    Attributes:
        module: its name.
        delta: fp32 master ``[blocks * block_rows, block_cols]``.
        moments: optimizer state's name -> fp32 tensor of the same shape; empty before the first step.
    """

    module: str
    delta: torch.Tensor
    moments: dict[str, torch.Tensor]


class Tuning(NamedTuple):
    """How one micro-batch is trained.

    Attributes:
        forward: keyword inputs -> model outputs.
        backward: takes the loss.
        step: ends the micro-batch; at the end of a global step it moves the weights, if anything does.
    """

    forward: Callable[..., Any]
    backward: Callable[[torch.Tensor], Any]
    step: Callable[[], Any]


class Engine(Protocol):
    """What the rest of the package asks of an engine. All methods are collective."""

    name: str

    def delta_dtype(self, base_dtype: torch.dtype) -> torch.dtype:
        """The dtype of the blocks' parameters: fp32 where they are their own masters."""

    def probing(self, model: nn.Module) -> AbstractContextManager[None]:
        """Make forwards and backwards of the bare ``model`` possible, without an optimizer."""

    def full_finetuning(
        self, model: nn.Module, learning_rate: float, accumulation: int
    ) -> AbstractContextManager[Tuning]:
        """Train all weights with AdamW inside the context, unclipped; gradients are averaged over ranks.

        Args:
            model: moved in place.
            learning_rate: constant.
            accumulation: micro-batches a global step.
        """

    def read_blocks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Module -> fp32 master on the CPU."""

    def write_blocks(self, model: nn.Module, deltas: dict[str, torch.Tensor]) -> None:
        """Set masters and the parameters that compute."""

    def read_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Iterator[BlockState], int]:
        """Masters and moments, module by module, and the optimizer's step count."""

    def write_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, states: Iterator[BlockState], step: int
    ) -> None:
        """Put back what :meth:`read_state` gave."""


def step_tensor(optimizer: torch.optim.Optimizer, step: int, device: torch.device) -> torch.Tensor:
    """A step count as torch's optimizers keep it: beside the parameter for fused kernels, else on the CPU."""
    beside = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.tensor(float(step), device=device if beside else "cpu")


def make_engine(name: str, deepspeed_config: dict | None = None) -> Engine:
    """The engine by name.

    Args:
        name: one of :data:`ENGINES`.
        deepspeed_config: the DeepSpeed JSON, for ``deepspeed``.

    Raises:
        SMTError: no such engine.
    """
    if name == "ddp":
        from smt_dist.engines.ddp import DDPEngine

        return DDPEngine()
    if name == "deepspeed":
        # Imported here: DeepSpeed takes seconds, and ddp doesn't need it.
        from smt_dist.engines.deepspeed import DeepSpeedEngine

        assert deepspeed_config is not None
        return DeepSpeedEngine(deepspeed_config)
    raise SMTError(f"--engine: {name!r} is not one of {', '.join(ENGINES)} (fsdp2 is planned)")
