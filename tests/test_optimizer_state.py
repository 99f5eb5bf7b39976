"""The optimizer's state is 12 bytes for each selected element, divided by the ranks under ZeRO, and nothing else."""

from __future__ import annotations

import pytest
from harness import launch
from tiny_models import save_tiny_llama
from workers.training import BLOCKS

MASTER_AND_MOMENTS = 12
PLANS = {
    1: [["ddp", "float32"], ["ddp", "bfloat16"]],
    2: [[engine, dtype] for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for dtype in ("float32", "bfloat16")],
    4: [["ddp", "float32"], ["fsdp2", "bfloat16"], ["zero2", "bfloat16"], ["zero3", "bfloat16"]],
}
RUNS = [(world_size, *run) for world_size, runs in PLANS.items() for run in runs]
each_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[1]}-{run[0]}ranks-{run[2]}")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(world size, engine, dtype) -> each rank's findings."""
    model = str(save_tiny_llama(tmp_path_factory.mktemp("model")))
    results = {}
    for world_size, runs in PLANS.items():
        folder = tmp_path_factory.mktemp(f"ranks{world_size}")
        ranks = launch("workers.state:measure", world_size, folder, model=model, runs=runs)
        results |= {(world_size, *run): [rank[index] for rank in ranks] for index, run in enumerate(runs)}
    return results


@each_run
def test_state_is_twelve_bytes_a_selected_element_and_shared_among_ranks(found, run):
    """SMT's promise to models that outgrow a device."""
    world_size, _, _ = run
    for rank in found[run]:
        expected = MASTER_AND_MOMENTS * rank["selected"] // world_size
        padding = MASTER_AND_MOMENTS * 2 * world_size * len(BLOCKS)  # one alignment unit a parameter
        assert abs(rank["bytes"] - expected) <= max(0.01 * expected, padding)
        assert rank["said"] == expected, "the log line and the measurement disagree"


@each_run
def test_all_ranks_together_hold_each_element_once(found, run):
    """A shard that is missing somewhere, or held twice, can hide in one rank's tolerance."""
    world_size = run[0]
    total = sum(rank["bytes"] for rank in found[run])
    selected = found[run][0]["selected"]
    padding = MASTER_AND_MOMENTS * 2 * world_size * len(BLOCKS)
    assert 0 <= total - MASTER_AND_MOMENTS * selected <= padding


@each_run
def test_frozen_weights_have_no_state_and_no_gradient(found, run):
    """State for one frozen weight costs more than all blocks: only the blocks may be known to the optimizer."""
    for rank in found[run]:
        assert rank["trainable"] == sorted(f"{module}.delta" for module in BLOCKS)
        assert rank["frozen_gradients"] == 0
        assert rank["tensors"] <= len(BLOCKS)
        assert rank["step_counters"] == rank["tensors"]


@each_run
def test_masters_are_fp32_over_a_base_of_any_dtype(found, run):
    """Steps smaller than bf16's spacing vanish when the master is bf16."""
    world_size, engine, dtype = run
    expected = {
        "ddp": "ShardedBlockOptimizer",
        "fsdp2": "ShardedBlockOptimizer",
        "zero1": "DeepSpeedZeroOptimizer",
        "zero2": "DeepSpeedZeroOptimizer",
        "zero3": "DeepSpeedZeroOptimizer_Stage3",
    }[engine]
    if (engine, dtype) == ("zero1", "bfloat16"):
        expected = "BF16_Optimizer"  # DeepSpeed's choice for stage 1 with fp32 gradients
    for rank in found[run]:
        assert rank["world_size"] == world_size
        assert rank["engine"].endswith(f", {expected}")
        assert rank["torch_optimizer"] == "AdamW"
        assert rank["base_dtypes"] == [f"torch.{dtype}"]
        assert rank["master_dtypes"] == ["torch.float32"]
