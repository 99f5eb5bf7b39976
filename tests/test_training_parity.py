"""Training the blocks is masked dense training, and engine, world size and recomputation change only rounding."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from dense_training import masked_dense_training
from harness import launch_runs
from tiers import Check, all_differences, chosen, slow_unless
from workers.runs import shard_group
from workers.training import BLOCKS, LEARNING_RATE, MAX_GRAD_NORM, STEPS

TOLERANCE = 1e-5
# Times what bf16 does to dense training: the blocks' error is a mean over many elements, a loss is one rounded number.
BLOCK_SLACK, SCALAR_SLACK = 1.05, 2.5

ZERO_1_2 = "DeepSpeedEngine, DeepSpeedZeroOptimizer"
ENGINE_TYPES = {
    "ddp": "LlamaForCausalLM, ShardedBlockOptimizer",
    "fsdp2": "FSDPLlamaForCausalLM, ShardedBlockOptimizer",
    "hsdp": "FSDPLlamaForCausalLM, ShardedBlockOptimizer",
    "zero1": ZERO_1_2,
    "zero2": ZERO_1_2,
    "zero3": "DeepSpeedEngine, DeepSpeedZeroOptimizer_Stage3",
}


class Run(NamedTuple):
    """One training."""

    world_size: int
    engine: str
    dtype: str
    accumulation: int
    checkpointing: bool
    form: str = "auto"

    def __str__(self) -> str:
        steps = f"acc{self.accumulation}-ckpt{int(self.checkpointing)}"
        form = "" if self.form == "auto" else f"-{self.form}"
        return f"{self.engine}-{self.world_size}ranks-{self.dtype}-{steps}{form}"


ADDITIVE = [
    Run(1, "ddp", "bfloat16", 2, False, "additive"),
    Run(2, "ddp", "float32", 2, True, "additive"),
    Run(2, "fsdp2", "bfloat16", 2, False, "additive"),
    Run(4, "fsdp2", "float32", 1, False, "additive"),
    Run(4, "hsdp", "float32", 2, True, "additive"),
]


def matrix() -> list[Run]:
    """Engines x world sizes x dtypes, each with some of accumulation x checkpointing.

    Pruned: fp32 runs (1, off) and (2, on), so that each setting meets each engine and world size, and (2, off) and
    (1, on) where engines differ most (ZeRO-3 and fsdp2 on 2 ranks). bf16 runs one of them: its test is about rounding.
    HSDP's two replicas need two ranks. Blocks beside the weights, which DeepSpeed always has: each engine, dtype and
    world size once.
    """
    runs = []
    for world_size, engine in itertools.product((1, 2, 4), ENGINE_TYPES):
        if engine == "hsdp" and world_size == 1:
            continue
        both = engine in ("zero3", "fsdp2") and world_size == 2
        plans = [(1, False), (2, True), *([(2, False), (1, True)] if both else [])]
        runs += [Run(world_size, engine, "float32", *plan) for plan in plans]
        runs.append(Run(world_size, engine, "bfloat16", 2, world_size == 4))
    return runs + ADDITIVE


def is_quick(run: Run) -> bool:
    """The default tier: one run of each engine on two ranks, in bf16 where engines differ most; and one process."""
    if run.dtype == "bfloat16":
        return run.world_size == 2 and run.engine in ("ddp", "fsdp2", "zero3")
    return run == ALONE or (run.world_size == 2 and (run.accumulation, run.checkpointing) == (2, True))


RUNS, ALONE = matrix(), Run(1, "ddp", "float32", 1, False)


def each_run(dtype: str):
    runs = slow_unless([run for run in RUNS if run.dtype == dtype], is_quick)
    return pytest.mark.parametrize("run", runs, ids=str)


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, model_folder):
    """Run -> each rank's findings; one launch for each world size."""
    asked = {ALONE, *chosen(request, "run")}
    runs = {run: (run.world_size, run._asdict()) for run in RUNS if run in asked}
    for _, keywords in runs.values():
        del keywords["world_size"]
    folder = tmp_path_factory.mktemp("parity")
    return launch_runs("workers.training:train", runs, folder, timeout=300, model=str(model_folder))


@pytest.fixture(scope="module")
def reference(found):
    """One process in fp32, the whole global batch at once."""
    return found[ALONE][0]


def engine_type_of(run: Run) -> str:
    """The classes that wrap the model and step the blocks."""
    if run.engine == "fsdp2" and run.world_size == 1:
        return ENGINE_TYPES["ddp"]  # nothing to shard
    if (run.engine, run.dtype) == ("zero1", "bfloat16"):
        return "DeepSpeedEngine, BF16_Optimizer"  # DeepSpeed's choice for stage 1 with fp32 gradients
    return ENGINE_TYPES[run.engine]


def relative_error(actual: list[float], truth: list[float]) -> float:
    """The largest over the steps."""
    return max(abs(ours - theirs) / theirs for ours, theirs in zip(actual, truth, strict=True))


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative norm of the difference of all blocks."""
    assert set(actual) == set(expected)
    ours, theirs = (torch.cat([blocks[name].flatten() for name in sorted(expected)]) for blocks in (actual, expected))
    return float((ours - theirs).norm() / theirs.norm())


def test_one_process_equals_masked_dense_training(reference, model_folder):
    """The definition of SMT: full fine-tuning of the model in which all but the blocks stand still."""
    dense = masked_dense_training(model_folder)
    assert reference["losses"] == pytest.approx(dense.losses, rel=TOLERANCE)
    assert reference["gradient_norms"] == pytest.approx(dense.gradient_norms, rel=TOLERANCE)
    assert max(dense.gradient_norms) > MAX_GRAD_NORM, "clipping has to act, or it isn't tested"
    # base + delta rounds at the base's scale, which the additive blocks don't; hence a little more room.
    assert distance(reference["blocks"], dense.blocks) <= 5 * TOLERANCE


@each_run("float32")
def test_run_trains_as_one_process_does(found, reference, run):
    """A wrong average over ranks, micro-batches or tokens shows in losses, from the second step on in the blocks too.

    Equal losses over a few steps can hide a group whose learning rate was dropped; equal blocks can't.
    """
    with all_differences() as check:
        for index, rank in enumerate(found[run]):
            with check(f"rank {index}: steps"):
                assert len(rank["losses"]) == STEPS
            for key, tolerance in (("losses", TOLERANCE), ("gradient_norms", TOLERANCE), ("learning_rates", 1e-12)):
                with check(f"rank {index}: {key}"):
                    assert rank[key] == pytest.approx(reference[key], rel=tolerance)
            with check(f"rank {index}: all blocks"):
                assert distance(rank["blocks"], reference["blocks"]) <= TOLERANCE
            for module, blocks in rank["blocks"].items():
                with check(f"rank {index}: blocks of {module}"):
                    assert distance({module: blocks}, {module: reference["blocks"][module]}) <= 10 * TOLERANCE
        check_claims(check, run, found[run], reference)


@pytest.fixture(scope="module")
def dense_in_bf16(model_folder):
    """What the rounding of a bf16 base does to plain dense training."""
    return masked_dense_training(model_folder, torch.bfloat16)


@each_run("bfloat16")
def test_bf16_is_as_near_to_the_truth_as_dense_training_is(found, reference, dense_in_bf16, run):
    """The truth is fp32. Blocks that were summed or kept in bf16 would be further off than the base makes them."""
    with all_differences() as check:
        for index, rank in enumerate(found[run]):
            for key, dense in (("losses", dense_in_bf16.losses), ("gradient_norms", dense_in_bf16.gradient_norms)):
                with check(f"rank {index}: {key}"):
                    granted = SCALAR_SLACK * relative_error(dense, reference[key])
                    assert relative_error(rank[key], reference[key]) <= granted
            with check(f"rank {index}: blocks"):
                error = distance(rank["blocks"], reference["blocks"])
                assert 0 < error <= BLOCK_SLACK * distance(dense_in_bf16.blocks, reference["blocks"])
        check_claims(check, run, found[run], reference)


def check_claims(check: Check, run: Run, ranks: list[dict], reference: dict) -> None:
    """Compare replicas, which might diverge, and the run with what it claims to be."""
    for index, rank in enumerate(ranks):
        with check(f"rank {index}: the same blocks as rank 0"):
            assert all(torch.equal(rank["blocks"][module], ranks[0]["blocks"][module]) for module in BLOCKS)
        claims = {
            "world_size": run.world_size,
            "engine": engine_type_of(run),
            "base_dtypes": [f"torch.{run.dtype}"],
            "trainable": sorted(f"{module}.delta" for module in BLOCKS),
            "in_place": run.form == "auto" and not run.engine.startswith("zero"),
            "base_elements_held": reference["base_elements_held"] // shard_group(run.engine, run.world_size),
        }
        for key, claim in claims.items():
            with check(f"rank {index}: {key}"):
                assert rank[key] == claim
        with check(f"rank {index}: recomputation"):
            assert (rank["layers_recomputed"] > 0) == run.checkpointing
        for module, blocks in rank["blocks"].items():
            with check(f"rank {index}: every block of {module} moved"):
                assert (blocks.view(len(BLOCKS[module]), -1).abs().amax(1) > LEARNING_RATE).all()
