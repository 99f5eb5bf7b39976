"""A plan is of the run that was asked for: its targets, its dtype, its micro-batches, its files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiers import slow
from transformers import LlamaConfig
from workers.memory import SHAPE, small_request

from smt_dist import BlockSelection, SMTConfig, SMTError
from smt_dist.memory.plan.plan import make_plan
from smt_dist.memory.plan.spread import measure_shape

# Enough for all layers, and quick.
FEW = {"groups": [{"blocks": 66}]}


@pytest.fixture
def model_config(tmp_path) -> Path:
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    return tmp_path / "model" / "config.json"


@pytest.mark.parametrize("method", ["smt", "full", "lora"])
def test_tied_weights_are_planned_when_they_are_sharded(method):
    """Small models tie their head to the embedding, and FSDP2 refuses to shard what is tied."""
    request = small_request(dtype="float32", engine="fsdp2", world_size=2, method=method, smt=FEW)
    request = replace(request, model=LlamaConfig(**SHAPE, tie_word_embeddings=True))
    assert make_plan(request).phases["training"].peak.total > 0


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_targets_outside_the_layers_are_planned(target):
    """The head and the embedding may have blocks like any other weight; a plan is what says whether they fit."""
    groups = [{"target_modules": ["attention", target], "blocks": 66}]
    plan = make_plan(small_request(dtype="float32", smt={"groups": groups}))
    assert plan.phases["training"].peak.blocks > 0


def test_a_head_of_the_selection_keeps_its_logits():
    """Its gradient needs them whole, so the loss isn't chunked; planned without them, the run would not fit."""
    selection = BlockSelection(block_size=(32, 32), blocks={"lm_head": [(0, 0)]})
    smt = {"groups": [{"target_modules": ["lm_head"], "blocks": 1}]}
    request = small_request(dtype="float32", smt=smt, selection=selection)
    chunked, whole = (make_plan(replace(request, loss_chunk=chunk)).phases["training"].peak.total for chunk in (64, 0))
    assert chunked == whole


@pytest.mark.parametrize("engine", ["ddp", pytest.param("fsdp2", marks=slow)])
def test_micro_batches_before_the_last_leave_their_gradients(engine):
    """Under fsdp2 all slices of the blocks' sums exist from the second micro-batch on: 4 bytes an element more."""
    request = small_request(dtype="float32", engine=engine, world_size=8, smt=FEW)
    one, four = (make_plan(replace(request, accumulation=count)).phases["training"].peak.gradients for count in (1, 4))
    assert four >= 4 * 66 * 32 * 32
    assert four == one if engine == "ddp" else four > one


@slow
def test_a_score_of_each_step_accumulates_between_micro_batches():
    """With one micro-batch its sums live inside the step only."""
    smt = FEW | {"selection": {"score": "abs_mean_per_step"}}
    request = small_request(dtype="float32", smt=smt)
    one, two = (make_plan(replace(request, accumulation=count)).phases["warmup"].peak.statistics for count in (1, 2))
    targets = sum(len(grid) * grid.block_elements for grid in measure_shape(request).grids.values())
    assert two >= 4 * targets
    assert one <= two


def test_a_full_ft_warm_up_is_planned_in_the_bases_dtype():
    """It moves the weights as they were loaded: planned with fp32 masters, it would be refused twice as early."""
    request = small_request(smt=FEW | {"warmup": {"mode": "full_ft"}})
    peak = make_plan(request).phases["warmup"].peak
    parameters = measure_shape(request).parameters
    assert peak.base_weights == pytest.approx(2 * parameters, rel=0.02)
    assert peak.optimizer_state == pytest.approx(4 * parameters, rel=0.02)


def test_a_joint_budget_is_one_budget():
    """What is too much for one group's targets may fit into all of them together, as the selection has it."""
    groups = [
        {"name": "a", "target_modules": ["q_proj"], "blocks": 400},
        {"name": "b", "target_modules": "mlp", "blocks": 1},
    ]
    apart = small_request(smt={"groups": groups})
    with pytest.raises(SMTError, match="400 blocks are asked for"):
        make_plan(apart)
    joint = small_request(smt={"groups": groups, "selection": {"budget": "joint"}})
    assert make_plan(joint).trained == 401 * 32 * 32


def test_a_selection_alone_is_planned_as_it_is_trained(run, model_config, tmp_path):
    """train.py takes the targets and the block size from it; so must a plan."""
    blocks = {"model.layers.0.self_attn.o_proj": [(0, 0)]}
    (tmp_path / "chosen.json").write_text(BlockSelection(block_size=(16, 16), blocks=blocks).to_json())
    flags = ["--model_config", str(model_config), "--selection", str(tmp_path / "chosen.json")]
    outcome = run("profile_memory.py", "plan", *flags)
    assert outcome.code == 0, outcome.err


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"offload_optimizer": "cpu"}, "offloading isn't planned"),
        ({"reduce_bucket_size": float("inf")}, "is no number"),
        ({"stage": 2}, "is of stage 2"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_planned_is_refused_in_one_line(run, model_config, tmp_path, section, message):
    """A traceback, or a plan of another stage than the run's."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}).replace("Infinity", "1e999"))
    (tmp_path / "smt.json").write_text(SMTConfig.model_validate({"block_size": 32}).to_json())
    flags = ["--model_config", str(model_config), "--smt_config", str(tmp_path / "smt.json"), "--engine", "zero3"]
    flags += ["--deepspeed", str(tmp_path / "ds.json")]
    assert message in run("profile_memory.py", "plan", *flags).error
