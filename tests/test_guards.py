"""Bad numbers move nothing, ranks that drift apart are stopped before anything is written, on every engine."""

from __future__ import annotations

import math

import pytest
import torch
from harness import launch
from workers.guards import BAD_STEP, MODULE, STEPS

ENGINES = ["ddp", "fsdp2", "zero1", "zero2", "zero3"]
each_engine = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, model_folder):
    """Engine -> case -> each rank's findings."""
    ranks = launch(
        "workers.guards:bad_numbers", 2, tmp_path_factory.mktemp("bad"), model=str(model_folder), engines=ENGINES
    )
    return {engine: {case: [rank[engine][case] for rank in ranks] for case in ranks[0][engine]} for engine in ENGINES}


@pytest.fixture(scope="module")
def drifting(tmp_path_factory, model_folder):
    """Engine -> when one element was damaged on rank 1 -> each rank's findings."""
    folder = tmp_path_factory.mktemp("drift")
    ranks = launch("workers.guards:drift", 2, folder, model=str(model_folder), engines=ENGINES)
    return {engine: {when: [rank[engine][when] for rank in ranks] for when in ranks[0][engine]} for engine in ENGINES}


def same_bits(one: dict, other: dict) -> bool:
    return one["counters"] == other["counters"] and all(
        torch.equal(tensor.view(torch.int32), other["tensors"][name].view(torch.int32))
        for name, tensor in one["tensors"].items()
    )


# -- bad numbers -----------------------------------------------------------------------------------------------


@each_engine
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_skipped_step_moves_no_bit(bad, engine, where):
    """One NaN in a moment stays there for ever; a moment that decays, or a counter that counts, is another run."""
    for rank in bad[engine][f"{where}-skip"]:
        assert rank["said"] == "nothing"
        assert len(rank["states"]) == STEPS
        before, after, later = rank["states"][BAD_STEP - 2], rank["states"][BAD_STEP - 1], rank["states"][BAD_STEP]
        assert same_bits(before, after)
        assert not same_bits(after, later), "training doesn't go on"
        assert after["counters"]["step"] == BAD_STEP - 1


@each_engine
def test_nothing_of_a_skipped_step_is_left(bad, engine):
    """Gradients that stay in a buffer would be added to the next step's: then the reason for the skip would matter."""
    for loss, gradient in zip(bad[engine]["loss-skip"], bad[engine]["gradient-skip"], strict=True):
        for one, other in zip(loss["states"], gradient["states"], strict=True):
            assert same_bits(one, other)


@each_engine
def test_skipped_step_is_counted_and_data_and_schedule_go_on(bad, engine):
    """Trainer holds the schedule under DeepSpeed only: engines would train differently."""
    for case in ("loss-skip", "gradient-skip"):
        for rank in bad[engine][case]:
            assert rank["skipped"] == 1
            assert rank["schedule"] == STEPS
            assert all(map(math.isfinite, rank["losses"]))
            assert f"checkpoint-{STEPS}" in rank["checkpoints"]


@each_engine
def test_stop_names_the_number_and_keeps_the_last_good_checkpoint(bad, engine):
    """All ranks must say the same, and the checkpoint of the bad step must not be there."""
    for rank in bad[engine]["loss-stop"]:
        assert rank["said"].startswith(f"SMTError: step {BAD_STEP}: rank 1: the loss of micro-batch 2 is nan")
        assert rank["checkpoints"] == [f"checkpoint-{BAD_STEP - 1}"]
    for rank in bad[engine]["gradient-stop"]:
        assert f"SMTError: step {BAD_STEP}: rank 0: the gradient of {MODULE} is not finite" in rank["said"]
        assert rank["checkpoints"] == [f"checkpoint-{BAD_STEP - 1}"]


@each_engine
def test_skipping_ends_at_the_limit(bad, engine):
    """A model that has become NaN would be "skipped" for days."""
    for rank in bad[engine]["limit"]:
        assert "3 steps in a row were bad, more than bad_numbers.limit (2)" in rank["said"]


# -- drift -----------------------------------------------------------------------------------------------------


@each_engine
def test_one_wrong_element_is_found_before_the_next_step(drifting, engine):
    """Spread by the next update, it would be on all ranks, where nobody could tell it from training."""
    for rank in drifting[engine]["in training"]:
        assert rank["said"].startswith("SMTError: step 3: the block values of " + MODULE)
        assert rank["checkpoints"] == ["checkpoint-1", "checkpoint-2"]


@each_engine
def test_one_wrong_element_is_never_saved(drifting, engine):
    """It would be in the newest checkpoint, the one that a relaunch takes."""
    for rank in drifting[engine]["before saving"]:
        assert "not saved: the block values of " + MODULE in rank["said"]
        assert rank["checkpoints"] == ["checkpoint-1", "checkpoint-2"]


def test_unguarded_nobody_notices(drifting):
    """Shows the fault: the run ends well, and its blocks aren't those of training."""
    for rank in drifting["ddp"]["unguarded"]:
        assert rank["said"] == "nothing"
        assert rank["checkpoints"] == [f"checkpoint-{step}" for step in range(1, STEPS + 1)]


def test_other_rows_or_another_order_on_one_rank_stop_the_run(tmp_path, model_folder):
    """A file that differs on one node, or a seed: rows would be seen twice and others never."""
    for rank in launch("workers.guards:other_data", 2, tmp_path, model=str(model_folder)):
        assert "the training data differs between ranks" in rank["rows"]
        assert "step 1: the ranks read the data in different orders" in rank["order"]
