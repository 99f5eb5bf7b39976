"""The rows of a run, and the batches that a warm-up or a probe sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import datasets
import torch

from smt_dist.arguments import SMTTrainingArguments
from smt_dist.data import CausalLMCollator
from smt_dist.distributed import get_rank, get_world_size


@dataclass
class TrainingData:
    """Tokenised rows and what turns them into batches."""

    train: datasets.Dataset
    evaluation: datasets.Dataset | None
    collator: CausalLMCollator


def warmup_batches(
    data: TrainingData, args: SMTTrainingArguments, steps: int, offset: int = 0
) -> Iterator[list[dict[str, torch.Tensor]]]:
    """This rank's micro-batches of each global step, in an order that depends on the seed only.

    A global step's rows are the same for every world size and engine with the same global batch; rows are drawn
    anew, in another order, each time the data is used up. ``offset`` is added to the seed.
    """
    per_device, rank = args.per_device_train_batch_size, get_rank()
    micro_batch = per_device * get_world_size()
    global_batch = micro_batch * args.gradient_accumulation_steps
    generator = torch.Generator().manual_seed((args.seed if args.data_seed is None else args.data_seed) + offset)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < global_batch:
            order += torch.randperm(len(data.train), generator=generator).tolist()
        step, order = order[:global_batch], order[global_batch:]
        yield [
            data.collator([data.train[index] for index in step[start + rank * per_device :][:per_device]])
            for start in range(0, global_batch, micro_batch)
        ]
