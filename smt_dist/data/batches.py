"""Hold a run's tokenised rows, and yield the batches that a warm-up or re-selection scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import torch

from smt_dist.data.dataset import CausalLMCollator
from smt_dist.distributed import get_rank, get_world_size


@dataclass
class TrainingData:
    """Hold the tokenised rows and the collator that makes them batches."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    collator: CausalLMCollator


class BatchOrder(NamedTuple):
    """Describe the size and order of global batches, for any number of ranks.

    Attributes:
        per_device: rows of one rank's micro-batch.
        accumulation: micro-batches of a global step.
        seed: of the order of the rows.
    """

    per_device: int
    accumulation: int
    seed: int


def warmup_batches(
    data: TrainingData, order: BatchOrder, steps: int, offset: int = 0
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Yield this rank's micro-batches of each global step, in an order given by the seed alone.

    A global step's rows are the same for every world size and engine with the same global batch. Each time the data is
    used up, it is shuffled again, into another order. ``offset`` is added to the seed.
    """
    rank = get_rank()
    micro_batch = order.per_device * get_world_size()
    global_batch = micro_batch * order.accumulation
    generator = torch.Generator().manual_seed(order.seed + offset)
    rows: list[int] = []
    for _ in range(steps):
        while len(rows) < global_batch:
            rows += torch.randperm(len(data.train), generator=generator).tolist()
        step, rows = rows[:global_batch], rows[global_batch:]
        yield [
            data.collator([data.train[index] for index in step[start + rank * order.per_device :][: order.per_device]])
            for start in range(0, global_batch, micro_batch)
        ]
