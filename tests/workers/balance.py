"""Measures each rank's optimizer state after one step, on real ranks and as a few ranks of a large fake group."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partitioned_param_coordinator
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from smt_dist.distributed import get_rank, get_world_size
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer
from smt_dist.training.arguments import prepare_deepspeed_config

SIDE = 32
# Blocks of 24 modules: many in some, few in others, as selections are. 150 in all.
BLOCKS = [1 + (7 * index) % 12 for index in range(24)]
ODD_SHAPES = [(7, 1), (3, 5), (1, 1), (129, 31)]


class Blocks(nn.Module):
    """Parameters of given shapes, each with a gradient of its own."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.deltas = nn.ParameterList(
            nn.Parameter(torch.randn(shape, generator=generator).to(torch.bfloat16)) for shape in shapes
        )

    def forward(self) -> torch.Tensor:
        return sum((delta * delta).sum() for delta in self.deltas)


def block_shapes() -> list[tuple[int, int]]:
    """Of the modules' blocks, stacked as SparseLinear stacks them."""
    return [(count * SIDE, SIDE) for count in BLOCKS]


def measure(_folder: Path, fake_ranks: list[int] | None = None, fake_world: int = 0) -> dict[str, Any]:
    """Bytes of fp32 masters and moments on this rank, by what shards them.

    Args:
        fake_ranks: this process becomes the one of these whose number is its rank, of the fake process group.
        fake_world: the number of ranks of that group.
    """
    if fake_ranks is not None:
        _join_fake_group(fake_ranks[get_rank()], fake_world)
    found = {
        "sharded": _sharded(block_shapes()),
        "sharded, odd shapes": _sharded(ODD_SHAPES),
        **{f"zero{stage}": _zero(stage) for stage in (1, 2, 3)},
    }
    return {"world_size": get_world_size(), "rank": get_rank(), "backend": dist.get_backend(), "bytes": found}


def _join_fake_group(rank: int, world_size: int) -> None:
    dist.destroy_process_group()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    # ZeRO-3 compares the order of weights with rank 0's, which a fake broadcast doesn't bring.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None


def _sharded(shapes: list[tuple[int, int]]) -> int:
    model = Blocks(shapes)
    optimizer = ShardedBlockOptimizer([{"params": list(model.deltas)}])
    model().backward()
    optimizer.step()
    memory = optimizer.memory_bytes()
    return memory["masters"] + memory["moments"]


def _zero(stage: int) -> int:
    batch = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": get_world_size(), "gradient_clipping": 1.0}
    config = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": 1, **batch}
    model = Blocks(block_shapes())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        config=prepare_deepspeed_config(config, torch.bfloat16),
    )
    engine.backward(engine())
    engine.step()
    optimizer = engine.optimizer.optimizer  # torch's, inside DeepSpeed's; its parameters are this rank's flat masters
    total = 0
    for master, state in optimizer.state.items():
        assert master.dtype == torch.float32
        total += master.nbytes + sum(value.nbytes for value in state.values() if value.shape == master.shape)
    engine.destroy()
    return total
