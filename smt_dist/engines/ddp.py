"""Run ``ddp``: every rank holds the whole base.

The model isn't wrapped: the blocks' optimizer does what DDP would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig

from smt_dist.distributed import is_distributed
from smt_dist.engines.base import Tuning
from smt_dist.engines.replicated import ReplicatedBlocks, adamw_step


class DDPEngine(ReplicatedBlocks):
    """Run one process, or several with plain replicas of the base."""

    name = "ddp"

    def load_options(self, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def prepare_base(self, model: nn.Module) -> None:
        pass

    def scoring(self, model: nn.Module) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    @contextmanager
    def full_finetuning(self, model: nn.Module, learning_rate: float, accumulation: int) -> Iterator[Tuning]:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True) if is_distributed() else model
        yield Tuning(wrapped, torch.Tensor.backward, adamw_step(model, learning_rate, accumulation))
