"""Weights that ZeRO-3 or FSDP2 shards: their full value and shape, and letting go of what is gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The full value of a parameter, gathered inside the context where ZeRO-3 or FSDP2 shards it (collective)."""
    if isinstance(parameter, DTensor):
        # An offloaded shard lies where the process group can't reach it.
        yield parameter.detach().to(parameter.device_mesh.device_type).full_tensor()
        return
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    # Imported here: DeepSpeed takes seconds, and only a model that it partitioned needs it.
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter


def reshard(model: nn.Module) -> None:
    """Let go of weights that FSDP2 keeps gathered after a forward without a backward: the outermost ones."""
    for unit in fsdp2_units(model):
        unit.reshard()


def fsdp2_units(model: nn.Module) -> list[FSDPModule]:
    """The modules whose weights FSDP2 gathers together, each set once."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def full_numel(parameter: torch.Tensor) -> int:
    """The elements of a parameter in full, also where ZeRO-3 or FSDP2 shards it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a parameter in full, also where ZeRO-3 left an empty stand-in."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
