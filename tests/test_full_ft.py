"""The authors' warm-up (real full fine-tuning) moves the base alike under every engine and world size."""

from __future__ import annotations

import pytest
import torch
from harness import launch, launch_engines
from tiers import chosen, engines_of, slow, slow_rows_unless
from tiny_models import save_tiny_llama
from transformers import AutoModelForCausalLM
from workers.runs import shard_group

LAUNCHES = {1: ["ddp"], 2: ["ddp", "fsdp2", "zero1", "zero2", "zero3"], 4: ["hsdp"]}
RUNS = [(world_size, engine) for world_size, engines in LAUNCHES.items() for engine in engines]
ALONE = (1, "ddp")
QUICK = [ALONE, (2, "fsdp2"), (2, "zero3")]
ENGINE_TYPES = {"ddp": "DDPEngine", "fsdp2": "FSDP2Engine", "hsdp": "FSDP2Engine"}
# AdamW divides by the gradient's size, so rounding of tiny gradients shows in the weights.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, model_folder):
    """(world size, engine) -> rank 0's findings."""
    folder, asked = tmp_path_factory.mktemp("launches"), {ALONE, *chosen(request, "world_size", "engine")}
    launches = engines_of(run for run in RUNS if run in asked)
    found = launch_engines("workers.full_ft:tune_fully", launches, folder, model=str(model_folder))
    return {run: ranks[0] for run, ranks in found.items()}


@pytest.mark.parametrize(("world_size", "engine"), slow_rows_unless(RUNS, lambda *run: run in QUICK))
def test_every_engine_scores_and_moves_the_base_as_one_process_does(found, model_folder, world_size, engine):
    """Failure: gradients summed or averaged wrongly, a lost accumulation, or a score scaled by the world size."""
    run, alone = found[world_size, engine], found[ALONE]
    assert run["world_size"] == world_size
    assert run["engine"] == ENGINE_TYPES.get(engine, "DeepSpeedEngine")
    assert run["base_elements_held"] * shard_group(engine, world_size) == alone["base_elements_held"]
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


@pytest.mark.parametrize(("vocabulary", "divides"), [(101, False), pytest.param(102, True, marks=slow)])
def test_tied_weight_that_fsdp2_would_split_in_two_is_refused(tmp_path, vocabulary, divides):
    """Shown first: the head goes on computing with old values. Once it doesn't, the refusal may go."""
    model = save_tiny_llama(tmp_path / "model", vocab_size=vocabulary, tie_word_embeddings=True)
    ranks = launch("workers.full_ft:split_tie", 2, tmp_path / "ranks", model=str(model))
    assert (max(rank["stale_rows"] for rank in ranks) == 0) == divides
    for rank in ranks:
        assert (rank["said"] == "nothing") == divides
        assert divides or "lm_head.weight is tied to model.embed_tokens.weight" in rank["said"]
