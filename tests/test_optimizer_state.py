"""The optimizer's state is 12 bytes for each selected element, divided by the ranks under ZeRO, and nothing else."""

from __future__ import annotations

import pytest
from harness import launch
from tiers import Check, all_differences, chosen, slow_unless
from tiny_models import save_tiny_llama
from workers.training import BLOCKS

MASTER_AND_MOMENTS = 12
PLANS = {
    1: [["ddp", "float32"], ["ddp", "bfloat16"]],
    2: [[engine, dtype] for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for dtype in ("float32", "bfloat16")],
    4: [["ddp", "float32"], ["fsdp2", "bfloat16"], ["zero2", "bfloat16"], ["zero3", "bfloat16"]],
}
RUNS = [(world_size, *run) for world_size, runs in PLANS.items() for run in runs]
QUICK = [(2, "ddp", "float32"), (2, "fsdp2", "bfloat16"), (2, "zero2", "bfloat16"), (2, "zero3", "bfloat16")]


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """(world size, engine, dtype) -> each rank's findings."""
    model = str(save_tiny_llama(tmp_path_factory.mktemp("model")))
    results, asked = {}, chosen(request, "run")
    for world_size in sorted({run[0] for run in asked}):
        runs = [run[1:] for run in asked if run[0] == world_size]
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        ranks = launch("workers.state:measure", world_size, folder, model=model, runs=runs)
        results |= {(world_size, *run): [rank[index] for rank in ranks] for index, run in enumerate(runs)}
    return results


@pytest.mark.parametrize(
    "run", slow_unless(RUNS, lambda run: run in QUICK), ids=lambda run: f"{run[1]}-{run[0]}ranks-{run[2]}"
)
def test_state_is_twelve_bytes_a_selected_element_and_shared_among_ranks(found, run):
    """SMT's promise to models that outgrow a device."""
    world_size, engine, dtype = run
    padding = MASTER_AND_MOMENTS * 2 * world_size * len(BLOCKS)  # one alignment unit a parameter
    with all_differences() as check:
        for index, rank in enumerate(found[run]):
            expected = MASTER_AND_MOMENTS * rank["selected"] // world_size
            with check(f"rank {index}: bytes"):
                assert abs(rank["bytes"] - expected) <= max(0.01 * expected, padding)
            with check(f"rank {index}: the log line and the measurement disagree"):
                assert rank["said"] == expected
            check_frozen(check, index, rank)
            check_claims(check, index, rank, world_size, engine, dtype)
        # A shard that is missing somewhere, or held twice, can hide in one rank's tolerance.
        with check("all ranks together hold each element once"):
            total = sum(rank["bytes"] for rank in found[run])
            assert 0 <= total - MASTER_AND_MOMENTS * found[run][0]["selected"] <= padding


def check_frozen(check: Check, index: int, rank: dict) -> None:
    """Check that frozen weights have no state: one's would cost more than all blocks'."""
    with check(f"rank {index}: what is trainable"):
        assert rank["trainable"] == sorted(f"{module}.delta" for module in BLOCKS)
    with check(f"rank {index}: gradients of frozen weights"):
        assert rank["frozen_gradients"] == 0
    with check(f"rank {index}: tensors and their step counters"):
        assert rank["step_counters"] == rank["tensors"] <= len(BLOCKS)


def check_claims(check: Check, index: int, rank: dict, world_size: int, engine: str, dtype: str) -> None:
    """Check the engine, and for fp32 masters: in bf16, steps below its spacing vanish."""
    optimizer = {
        "ddp": "ShardedBlockOptimizer",
        "fsdp2": "ShardedBlockOptimizer",
        "zero1": "DeepSpeedZeroOptimizer",
        "zero2": "DeepSpeedZeroOptimizer",
        "zero3": "DeepSpeedZeroOptimizer_Stage3",
    }[engine]
    if (engine, dtype) == ("zero1", "bfloat16"):
        optimizer = "BF16_Optimizer"  # DeepSpeed's choice for stage 1 with fp32 gradients
    with check(f"rank {index}: optimizer"):
        assert rank["engine"].endswith(f", {optimizer}")
    claims = {
        "world_size": world_size,
        "torch_optimizer": "AdamW",
        "base_dtypes": [f"torch.{dtype}"],
        "master_dtypes": ["torch.float32"],
    }
    for key, claim in claims.items():
        with check(f"rank {index}: {key}"):
            assert rank[key] == claim
