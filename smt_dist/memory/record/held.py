"""Find what a rank holds between steps, by category."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from smt_dist.engines.base import unwrapped
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer


def all_tensors() -> list[torch.Tensor]:
    """Return every tensor that Python's garbage collector tracks."""
    # By type, not isinstance: a lazy module's __class__ would import it.
    return [value for value in gc.get_objects() if issubclass(type(value), torch.Tensor)]


def held_by_model(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (category, tensors) of a model's parameters, buffers and gradients."""
    parameters = list(model.parameters())
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    yield "base_weights", [frozen, list(model.buffers())]
    yield "blocks" if frozen else "base_weights", trained
    # ZeRO-3 keeps a weight's shard beside it; the weight itself is there while it is gathered.
    for names, values in (("base_weights", frozen), ("blocks" if frozen else "base_weights", trained)):
        yield names, [getattr(parameter, "ds_tensor", None) for parameter in values]
    yield "gradients", [parameter.grad for parameter in parameters]


def held_by_optimizer(optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Any]]:
    """Yield (category, tensors) of the blocks' optimizer, of DeepSpeed's or of a plain one."""
    if optimizer is None:
        return
    inner = unwrapped(optimizer)
    if isinstance(inner, ShardedBlockOptimizer):
        yield from inner.held_tensors()
    elif type(inner).__module__.startswith("deepspeed."):
        from smt_dist.engines.deepspeed import held_tensors

        yield from held_tensors(inner)
    else:
        yield "optimizer_state", [list(state.values()) for state in inner.state.values()]
