"""The authors' warm-up (real full fine-tuning) moves the base alike under every engine and world size."""

from __future__ import annotations

import pytest
import torch
from harness import launch_engines
from transformers import AutoModelForCausalLM

LAUNCHES = {1: ["ddp"], 2: ["ddp", "zero1", "zero2", "zero3"]}
RUNS = [(world_size, engine) for world_size, engines in LAUNCHES.items() for engine in engines]
# AdamW divides by the gradient's size, so rounding of tiny gradients shows in the weights.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder):
    """(world size, engine) -> rank 0's findings."""
    folder = tmp_path_factory.mktemp("launches")
    found = launch_engines("workers.full_ft:tune_fully", LAUNCHES, folder, model=str(model_folder))
    return {run: ranks[0] for run, ranks in found.items()}


@pytest.mark.parametrize(("world_size", "engine"), RUNS)
def test_every_engine_scores_and_moves_the_base_as_one_process_does(found, model_folder, world_size, engine):
    """Failure: gradients summed or averaged wrongly, a lost accumulation, or a score scaled by the world size."""
    run, alone = found[world_size, engine], found[1, "ddp"]
    assert run["world_size"] == world_size
    assert run["engine"] == ("DDPEngine" if engine == "ddp" else "DeepSpeedEngine")
    if engine == "zero3":
        assert run["base_elements_held"] < alone["base_elements_held"]
    for name, table in alone["tables"].items():
        torch.testing.assert_close(run["tables"][name], table, rtol=TOLERANCE, atol=0)
    assert run["selection"] == alone["selection"]

    base, moved, moved_alone = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (model_folder, run["moved"], alone["moved"])
    )
    for name, weight in base.items():
        update = moved_alone[name] - weight
        assert update.norm() > 0, f"{name} did not move"
        assert (moved[name] - moved_alone[name]).norm() <= TOLERANCE * update.norm(), name
