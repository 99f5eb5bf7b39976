"""Non-finite values move nothing, replicas that diverge are stopped before anything is written, on every engine."""

from __future__ import annotations

import math

import pytest
import torch
from harness import launch
from tiers import Check, all_differences, chosen, slow_unless
from workers.guards import MODULE, NON_FINITE_STEP, STEPS

ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
each_engine = pytest.mark.parametrize("engine", slow_unless(ENGINES, lambda engine: engine in ("ddp", "zero3")))


@pytest.fixture(scope="module")
def non_finite(request, tmp_path_factory, model_folder):
    """Engine -> case -> each rank's findings."""
    folder, engines = tmp_path_factory.mktemp("non_finite"), chosen(request, "engine")
    ranks = launch("workers.guards:non_finite", 2, folder, model=str(model_folder), engines=engines)
    return {engine: {case: [rank[engine][case] for rank in ranks] for case in ranks[0][engine]} for engine in engines}


@pytest.fixture(scope="module")
def diverging(request, tmp_path_factory, model_folder):
    """Engine -> when one element was damaged on rank 1 -> each rank's findings."""
    folder, engines = tmp_path_factory.mktemp("divergence"), list(dict.fromkeys(["ddp", *chosen(request, "engine")]))
    ranks = launch("workers.guards:replica_divergence", 2, folder, model=str(model_folder), engines=engines)
    return {engine: {when: [rank[engine][when] for rank in ranks] for when in ranks[0][engine]} for engine in engines}


def same_bits(one: dict, other: dict) -> bool:
    return one["counters"] == other["counters"] and all(
        torch.equal(tensor.view(torch.int32), other["tensors"][name].view(torch.int32))
        for name, tensor in one["tensors"].items()
    )


# -- non-finite values -----------------------------------------------------------------------------------------


@each_engine
def test_skipped_step_leaves_nothing_and_training_goes_on(non_finite, engine):
    """One NaN in a moment stays there for ever; a moment that decays, or a counter that counts, is another run."""
    with all_differences() as check:
        for where in ("loss", "gradient"):
            for index, rank in enumerate(non_finite[engine][f"{where}-skip"]):
                check_skipped(check, f"{where}, rank {index}", rank)
        # Gradients that stay in a buffer would be added to the next step's: then the reason for the skip would matter.
        for index, (loss, gradient) in enumerate(
            zip(non_finite[engine]["loss-skip"], non_finite[engine]["gradient-skip"], strict=True)
        ):
            for step, (one, other) in enumerate(zip(loss["states"], gradient["states"], strict=True), start=1):
                with check(f"rank {index}: after step {step}, the same whether loss or gradient was not finite"):
                    assert same_bits(one, other)


def check_skipped(check: Check, label: str, rank: dict) -> None:
    """Check that no bit moves and the schedule goes on, which is Trainer's under DeepSpeed."""
    with check(f"{label}: message and steps"):
        assert rank["said"] == "nothing"
        assert len(rank["states"]) == STEPS
    before, after, later = (
        rank["states"][NON_FINITE_STEP - 2],
        rank["states"][NON_FINITE_STEP - 1],
        rank["states"][NON_FINITE_STEP],
    )
    with check(f"{label}: the skipped step moves no bit"):
        assert same_bits(before, after)
    with check(f"{label}: training goes on"):
        assert not same_bits(after, later)
    with check(f"{label}: counter"):
        assert after["counters"]["step"] == NON_FINITE_STEP - 1
    with check(f"{label}: steps that were skipped, steps of the schedule"):
        assert (rank["skipped"], rank["schedule"]) == (1, STEPS)
    with check(f"{label}: losses in the log"):
        assert all(map(math.isfinite, rank["losses"]))
    with check(f"{label}: last checkpoint"):
        assert f"checkpoint-{STEPS}" in rank["checkpoints"]


@each_engine
def test_stop_names_the_number_and_keeps_the_last_good_checkpoint(non_finite, engine):
    """All ranks must say the same, and the checkpoint of the step that wasn't finite must not be there."""
    for rank in non_finite[engine]["loss-stop"]:
        assert rank["said"].startswith(f"SMTError: step {NON_FINITE_STEP}: rank 1: the loss of micro-batch 2 is nan")
        assert rank["checkpoints"] == [f"checkpoint-{NON_FINITE_STEP - 1}"]
    for rank in non_finite[engine]["gradient-stop"]:
        assert f"SMTError: step {NON_FINITE_STEP}: rank 0: the gradient of {MODULE} is not finite" in rank["said"]
        assert rank["checkpoints"] == [f"checkpoint-{NON_FINITE_STEP - 1}"]


@each_engine
def test_skipping_ends_at_the_limit(non_finite, engine):
    """A model that has become NaN would be "skipped" for days."""
    for rank in non_finite[engine]["limit"]:
        assert "3 steps in a row were not finite, more than non_finite.limit (2)" in rank["said"]


# -- replica divergence ----------------------------------------------------------------------------------------


@each_engine
def test_one_wrong_element_is_found_before_the_next_step(diverging, engine):
    """Spread by the next update, it would be on all ranks, where nobody could tell it from training."""
    for rank in diverging[engine]["in training"]:
        assert rank["said"].startswith("SMTError: step 3: the block values of " + MODULE)
        assert rank["checkpoints"] == ["checkpoint-1", "checkpoint-2"]


@each_engine
def test_one_wrong_element_is_never_saved(diverging, engine):
    """It would be in the newest checkpoint, the one that a relaunch takes."""
    for rank in diverging[engine]["before saving"]:
        assert "not saved: the block values of " + MODULE in rank["said"]
        assert rank["checkpoints"] == ["checkpoint-1", "checkpoint-2"]


def test_unguarded_nobody_notices(diverging):
    """Shows the fault: the run ends well, and its blocks aren't those of training."""
    for rank in diverging["ddp"]["unguarded"]:
        assert rank["said"] == "nothing"
        assert rank["checkpoints"] == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]


def test_other_rows_or_another_order_on_one_rank_stop_the_run(tmp_path, model_folder):
    """A file that differs on one node, or a seed: rows would be seen twice and others never."""
    for rank in launch("workers.guards:other_data", 2, tmp_path, model=str(model_folder)):
        assert "the training data differs between ranks" in rank["rows"]
        assert "step 1: the ranks read the data in different orders" in rank["order"]
