"""Read weights that ZeRO-3 or FSDP2 shards, and release what is gathered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


@contextmanager
def gathered(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a parameter's full value, gathered inside the context; collective.

    It is gathered where ZeRO-3 or FSDP2 shards it.
    """
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
    """Release the weights that FSDP2 keeps gathered after a forward without a backward.

    These are the outermost ones.
    """
    for unit in fsdp2_units(model):
        unit.reshard()


def fsdp2_units(model: nn.Module) -> list[FSDPModule]:
    """Return the modules whose weights FSDP2 gathers together."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def full_numel(parameter: torch.Tensor) -> int:
    """Return the number of elements of a whole parameter, also where it is sharded."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a whole parameter, also where it is sharded."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
