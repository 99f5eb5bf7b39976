"""``ddp``: every rank holds the whole base and the whole optimizer state; Trainer wraps the model in DDP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import count

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smt_dist.distributed import is_distributed
from smt_dist.engines import BlockState, Tuning, step_tensor
from smt_dist.model import sparse_layers


class DDPEngine:
    """One process, or several with plain replicas."""

    name = "ddp"

    def delta_dtype(self, base_dtype: torch.dtype) -> torch.dtype:  # noqa: ARG002
        return torch.float32

    def probing(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    @contextmanager
    def full_finetuning(self, model: nn.Module, learning_rate: float, accumulation: int) -> Iterator[Tuning]:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True) if is_distributed() else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        micro_batches = count(1)

        def step() -> None:
            if next(micro_batches) % accumulation == 0:
                optimizer.step()
                optimizer.zero_grad()

        yield Tuning(wrapped, torch.Tensor.backward, step)

    def read_blocks(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {name: layer.delta.detach().cpu() for name, layer in sparse_layers(model).items()}

    def write_blocks(self, model: nn.Module, deltas: dict[str, torch.Tensor]) -> None:
        for name, layer in sparse_layers(model).items():
            with torch.no_grad():
                layer.delta.copy_(deltas[name])

    def read_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Iterator[BlockState], int]:
        layers = sparse_layers(model)
        steps = {int(state["step"]) for state in optimizer.state.values()}

        def states() -> Iterator[BlockState]:
            for name, layer in layers.items():
                moments = {
                    key: value.detach().cpu()
                    for key, value in optimizer.state[layer.delta].items()
                    if torch.is_tensor(value) and value.shape == layer.delta.shape
                }
                yield BlockState(name, layer.delta.detach().cpu(), moments)

        return states(), max(steps, default=0)

    def write_state(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, states: Iterator[BlockState], step: int
    ) -> None:
        layers = sparse_layers(model)
        for state in states:
            delta = layers[state.module].delta
            with torch.no_grad():
                delta.copy_(state.delta)
            if state.moments:
                moments = {key: value.to(delta.device, copy=True) for key, value in state.moments.items()}
                optimizer.state[delta] = {"step": step_tensor(optimizer, step, delta.device), **moments}
