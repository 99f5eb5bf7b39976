"""Blocks inside the weights of replicated and sharded bases: bits, switching off, lost and interrupted writes."""

from __future__ import annotations

import harness
import pytest
from harness import launch, launch_runs
from tiers import all_differences, chosen, slow_unless
from workers.in_place import MODULE

RUNS = [
    (world_size, engine, dtype, units)
    for world_size in (1, 2, 4)
    for engine in ("ddp", "fsdp2", "hsdp")
    for dtype in ("float32", "bfloat16")
    for units in ("layer", "weight")
    if not (units == "weight" and engine == "ddp") and not (engine == "hsdp" and world_size == 1)
]
QUICK = {
    (1, "ddp", "bfloat16", "layer"),
    (2, "ddp", "float32", "layer"),
    (2, "fsdp2", "bfloat16", "layer"),
    (2, "fsdp2", "float32", "weight"),
}
each_run = pytest.mark.parametrize(
    "run", slow_unless(RUNS, lambda run: run in QUICK), ids=lambda run: "-".join(map(str, run))
)
each_engine = pytest.mark.parametrize("engine", slow_unless(["ddp", "fsdp2", "hsdp"], lambda engine: engine != "hsdp"))


@pytest.fixture(scope="module")
def looked(request, tmp_path_factory, model_folder):
    """Run -> what each rank saw."""
    runs = {}
    for run in chosen(request, "run"):
        world_size, engine, dtype, units = run
        runs[run] = world_size, {"engine": engine, "dtype": dtype} | ({"fsdp2_units": units} if engine != "ddp" else {})
    folder = tmp_path_factory.mktemp("look")
    return launch_runs("workers.in_place:look", runs, folder, timeout=300, model=str(model_folder))


@each_run
def test_training_computes_what_the_merged_model_does_and_switched_off_the_base(looked, run):
    """In bits, in mid-run; where each weight is gathered by itself the base comes back within rounding."""
    world_size, engine, dtype, units = run
    whole_units = units == "layer" or world_size == 1
    with all_differences() as check:
        for index, rank in enumerate(looked[run]):
            with check(f"rank {index}: form, world size, engine"):
                assert rank["forms"] == ["InPlaceLinear"]
                assert rank["world_size"] == world_size
                assert ("FSDP" in rank["engine"]) == (engine != "ddp" and world_size > 1)
            with check(f"rank {index}: on is merged, and not the base"):
                assert rank["on is merged"]
                assert rank["moved"]
            with check(f"rank {index}: off is the base"):
                assert (
                    rank["off is base"]
                    if whole_units
                    else rank["off from base"] < (1e-6 if dtype == "float32" else 0.02)
                )
            with check(f"rank {index}: a reference forward changes no gradient"):
                assert rank["reference"]
            with check(f"rank {index}: a step between a forward and its backward raises"):
                assert "modified by an inplace operation" in rank["between"]


@pytest.fixture(scope="module")
def writes(request, tmp_path_factory, model_folder):
    """Engine -> what each rank found."""
    engines = chosen(request, "engine")
    ranks = launch(
        "workers.in_place:lose_writes", 2, tmp_path_factory.mktemp("lost"), model=str(model_folder), engines=engines
    )
    return {engine: [rank[engine] for rank in ranks] for engine in engines}


@each_engine
def test_a_lost_write_is_found_before_the_next_step(writes, engine):
    for rank in writes[engine]:
        assert rank["lost"].startswith(
            f"step 3: the block values of {MODULE} on rank 1 aren't those of their fp32 masters"
        )


@each_engine
def test_an_interrupted_write_is_made_good_before_anything_computes(writes, engine):
    for rank in writes[engine]:
        assert rank["cut"]["interrupted"]
        assert rank["cut"]["damaged"] is not None, "without the mend old values would compute"
        assert rank["cut"]["mended"]


def test_switching_off_on_one_rank_alone_is_an_error(tmp_path, model_folder, monkeypatch):
    """Without it that rank would wait for the others' W0 until their collectives time out, half an hour later."""
    monkeypatch.setattr(harness, "GRACE", 1)
    with pytest.raises(AssertionError, match=r"not all ranks came within 2 s .*blocks_disabled on every rank"):
        launch("workers.in_place:switch_off_alone", 2, tmp_path, model=str(model_folder))
