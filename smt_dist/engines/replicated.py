"""Implement what ``ddp`` and ``fsdp2`` share.

Blocks are replicated parameters whose state ``ShardedBlockOptimizer`` shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

import torch
from torch import nn

from smt_dist.engines.base import BlockState, Moments, unwrapped
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer
from smt_dist.sparse.surgery import sparse_layers


class ReplicatedBlocks:
    """Implement the half of an engine that handles the blocks.

    Args:
        reduce_dtype: in which their gradients cross the network.
        micro_batches: backwards in a step; told, the last of them sends the gradients slice by slice.
    """

    def __init__(self, reduce_dtype: torch.dtype = torch.float32, micro_batches: int | None = None) -> None:
        self.reduce_dtype = reduce_dtype
        self.micro_batches = micro_batches

    def forget(self, model: nn.Module) -> None:
        """Do nothing: no engine holds the model."""

    def make_optimizer(
        self,
        groups: list[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        options: dict[str, Any],
        may_be_idle: bool = False,
        model: nn.Module | None = None,
    ) -> ShardedBlockOptimizer:
        # A rank that waits for a gradient that doesn't come would block FSDP2's gathers on the other ranks.
        micro_batches = None if may_be_idle else self.micro_batches
        return ShardedBlockOptimizer(groups, optimizer_class, options, self.reduce_dtype, micro_batches, model)

    def read_blocks(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, layer in sparse_layers(model).items():
            if optimizer is None:
                yield name, layer.read_delta().float().cpu()
            else:
                yield name, unwrapped(optimizer).read_master(layer.delta)

    def write_blocks(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None, deltas: Mapping[str, torch.Tensor]
    ) -> None:
        for name, layer in sparse_layers(model).items():
            if optimizer is None:
                layer.write_delta(deltas[name])
            else:
                unwrapped(optimizer).write(layer.delta, deltas[name])
        if optimizer is not None:
            unwrapped(optimizer).publish()

    def read_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        sharded: ShardedBlockOptimizer = unwrapped(optimizer)
        layers = sparse_layers(model)
        tensors = ((name, sharded.read_moments(layer.delta)) for name, layer in layers.items())
        return Moments(sharded.moment_names, sharded.counters, tensors)

    def write_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        states: Iterator[BlockState],
        counters: dict[str, int | float],
    ) -> None:
        sharded: ShardedBlockOptimizer = unwrapped(optimizer)
        layers = sparse_layers(model)
        for state in states:
            sharded.write(layers[state.module].delta, state.delta, state.moments)
        sharded.set_counters(counters)
        sharded.publish()

    def damaged_block(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
        parameter = unwrapped(optimizer).damaged_parameter()
        return next((name for name, layer in sparse_layers(model).items() if layer.delta is parameter), None)

    def memory_bytes(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        return unwrapped(optimizer).memory_bytes()


def adamw_step(model: nn.Module, learning_rate: float, accumulation: int) -> Callable[[], None]:
    """Make a function that steps AdamW over all weights, called after each micro-batch.

    It steps at the end of a global step.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    micro_batches = count(1)

    def step() -> None:
        if next(micro_batches) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()

    return step
