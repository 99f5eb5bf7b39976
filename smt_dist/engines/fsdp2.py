"""Run FSDP2 or HSDP: transformers shards the base as it is read.

The blocks are replicated.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig
from transformers.distributed import DistributedConfig

from smt_dist.distributed import get_world_size
from smt_dist.engines.base import Tuning
from smt_dist.engines.fsdp2_units import release_early, sharding_plan
from smt_dist.engines.replicated import ReplicatedBlocks, adamw_step
from smt_dist.errors import SMTError


class FSDP2Engine(ReplicatedBlocks):
    """Run FSDP2 over all ranks, or HSDP.

    HSDP is sharded inside a group of ranks and replicated over groups.

    Args:
        reduce_dtype: as for :class:`ReplicatedBlocks`. The blocks' state is sharded over all ranks either way.
        replicas: the number of groups; divides the world size. Each rank holds (base's bytes) x replicas / world size.
        cpu_offload: keep the shards in host memory; GPU only.
        units: what is gathered at once (:func:`smt_dist.engines.fsdp2_units.sharding_plan`).
        prefetch: gather the next unit of the backward while one computes.
        micro_batches: backwards in a step, if it is known.
    """

    name = "fsdp2"

    def __init__(
        self,
        reduce_dtype: torch.dtype,
        replicas: int = 1,
        cpu_offload: bool = False,
        units: str = "auto",
        prefetch: bool = True,
        micro_batches: int | None = None,
    ) -> None:
        super().__init__(reduce_dtype, micro_batches)
        self.replicas = replicas
        self.cpu_offload = cpu_offload
        self.units = units
        self.prefetch = prefetch

    def load_options(self, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:
        if get_world_size() == 1:
            return {}  # nothing to shard
        distributed = DistributedConfig(
            fsdp_size=get_world_size() // self.replicas,
            dp_replicate_size=self.replicas,
            fsdp_cpu_offload=self.cpu_offload,
            fsdp_plan=sharding_plan(config, dtype, self.units),
        )
        return {"distributed_config": distributed}

    def prepare_base(self, model: nn.Module) -> None:
        release_early(model, self.prefetch)

    def scoring(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()  # FSDP2's own hooks gather the weights

    @contextmanager
    def full_finetuning(self, model: nn.Module, learning_rate: float, accumulation: int) -> Iterator[Tuning]:
        _refuse_split_ties(model)
        # FSDP2's hooks average the gradients over ranks, micro-batch by micro-batch.
        yield Tuning(model, torch.Tensor.backward, adamw_step(model, learning_rate, accumulation))


def _refuse_split_ties(model: nn.Module) -> None:
    """Refuse tied weights whose rows don't divide over the shard group.

    Seen with torch 2.13 and transformers 5.23.

    Both owners of such a weight pad a copy of the last shard of their own, and the optimizer moves only one of them:
    the other goes on computing with old values.
    """
    owners: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = owners.setdefault(id(parameter), name)
        if first != name and isinstance(parameter, DTensor) and parameter.shape[0] % parameter.device_mesh.size(-1):
            raise SMTError(
                f"--engine fsdp2 with warmup.mode full_ft: {name} is tied to {first} and its {parameter.shape[0]} rows "
                "don't divide over the ranks that share them; use --engine ddp or --deepspeed, or mode scoring"
            )
