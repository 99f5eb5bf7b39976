"""The pairs of runs that save and resume a checkpoint, and how nearly they have to agree."""

from __future__ import annotations

import torch
from workers.checkpoint_matrix import Run

TOLERANCE = 1e-5
# Numbers of bf16 lie up to 2^-7 of their size apart. Activations and single gradients differ by that where another
# number of rows makes sums run in another order, and Adam hands it on: twice as much is granted to norms and blocks,
# half to losses, which average over tokens. With as many rows a micro-batch nothing differs, and fp32's tolerance
# holds. The state itself is fp32 and compared bit by bit at load.
BF16_TOLERANCES = {"losses": 2**-8, "gradient_norms": 2**-6, "masters": 2**-6}
BF16, NADAM = {"dtype": "bfloat16"}, {"optim": "torch.optim.NAdam"}

# (saved under, resumed under)
PAIRS = [
    (Run("ddp", 1), Run("zero3", 2)),
    (Run("fsdp2", 1), Run("zero1", 4)),
    (Run("zero1", 1), Run("fsdp2", 1)),
    (Run("ddp", 2, accumulation=2), Run("fsdp2", 4)),
    (Run("fsdp2", 2), Run("ddp", 1)),
    (Run("hsdp", 2), Run("zero2", 1)),
    (Run("zero1", 2), Run("hsdp", 2)),
    (Run("zero1", 2), Run("hsdp", 4)),
    (Run("zero2", 2), Run("fsdp2", 2)),
    (Run("zero3", 2), Run("ddp", 2, accumulation=2)),
    (Run("fsdp2", 4), Run("zero1", 2)),
    (Run("hsdp", 4), Run("zero3", 4)),
    (Run("zero2", 4), Run("ddp", 2)),
    (Run("zero3", 4), Run("zero2", 2)),
    (Run("fsdp2", 2, **BF16), Run("zero1", 2, **BF16)),
    (Run("zero1", 2, **BF16), Run("fsdp2", 4, **BF16)),
    (Run("zero3", 2, **BF16), Run("zero2", 1, **BF16)),
    (Run("ddp", 2, **NADAM), Run("fsdp2", 1, **NADAM)),
    (Run("ddp", 2, **NADAM), Run("zero2", 2, **NADAM)),
]
SAVED = list(dict.fromkeys(saved for saved, _ in PAIRS))
PLAIN = Run("ddp", 1)
# (saved under, resumed under, what is lost on the way)
LOSSES = [
    (PLAIN, PLAIN, "data"),
    (PLAIN, PLAIN, "moments"),
    (Run("zero3", 2, **BF16), Run("ddp", 1, **BF16), "data"),
    (Run("zero3", 2, **BF16), Run("ddp", 1, **BF16), "moments"),
]
WORLD_SIZES = (1, 2, 4)
# The default tier's pairs have every engine on both sides, on one rank and on two.
QUICK = [
    (Run("ddp", 1), Run("zero3", 2)),
    (Run("fsdp2", 2, **BF16), Run("zero1", 2, **BF16)),
    (Run("hsdp", 2), Run("zero2", 1)),
    (Run("zero1", 2), Run("hsdp", 2)),
    (Run("zero2", 2), Run("fsdp2", 2)),
    (Run("zero3", 2), Run("ddp", 2, accumulation=2)),
    (Run("ddp", 2, **NADAM), Run("fsdp2", 1, **NADAM)),
]

ZERO = "DeepSpeedEngine, DeepSpeedZeroOptimizer"
ENGINE_TYPES = {
    "ddp": "LlamaForCausalLM, ShardedBlockOptimizer",
    "fsdp2": "FSDPLlamaForCausalLM, ShardedBlockOptimizer",
    "hsdp": "FSDPLlamaForCausalLM, ShardedBlockOptimizer",
    "zero1": ZERO,
    "zero2": ZERO,
    "zero3": f"{ZERO}_Stage3",
}


def equal_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Not only equal numbers: -0.0 isn't 0.0 here."""
    return set(actual) == set(expected) and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
        for name, tensor in actual.items()
    )


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative norm of the difference of all blocks."""
    ours, theirs = (torch.cat([blocks[name].flatten() for name in sorted(expected)]) for blocks in (actual, expected))
    return float((ours - theirs).norm() / theirs.norm())


def tolerance_of(key: str, *pair: Run) -> float:
    """What rounding explains of the difference between a resumed run and the straight one."""
    micro_batches = {run.world_size * run.accumulation for run in pair}
    rounds_alike = len(micro_batches) == 1 and len({form_of(run) for run in pair}) == 1
    return BF16_TOLERANCES[key] if pair[0].dtype == "bfloat16" and not rounds_alike else TOLERANCE


def form_of(run: Run) -> str:
    """The form of a run's blocks: inside their weights they are rounded with them, beside them on their own."""
    return "additive" if run.engine.startswith("zero") else "in_place"
