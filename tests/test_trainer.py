"""SMTTrainer on one process: what it spares, and what it makes of incomplete checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import make_batches, make_model

import smt_dist
from smt_dist import BlockSelection
from smt_dist.arguments import SMTTrainingArguments
from smt_dist.checkpoint import OPTIMIZER_FILE, SCHEDULE_FILE, load_schedule, load_states, save_moments
from smt_dist.engines import BlockState
from smt_dist.errors import SMTError
from smt_dist.trainer import SMTTrainer, last_checkpoint

TOP = BlockSelection(block_size=(8, 8), blocks={"model.layers.1.self_attn.v_proj": [(0, 1)]})


def make_trainer(folder: Path, **options) -> SMTTrainer:
    model = make_model("llama")
    smt_dist.apply_selection(model, TOP)
    rows = [{name: value[0] for name, value in batch.items()} for batch in make_batches(8)]
    defaults = {"dtype": "float32", "report_to": [], "disable_tqdm": True, "max_steps": 2, "save_strategy": "no"}
    args = SMTTrainingArguments(output_dir=str(folder), per_device_train_batch_size=2, **(defaults | options))
    return SMTTrainer(model, args, train_dataset=rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_below_the_lowest_block_have_no_backward(tmp_path, checkpointing):
    """With gradient checkpointing they would even be computed again; transformers asks for that by default."""
    trainer = make_trainer(tmp_path, activation_checkpointing=checkpointing)
    forwards, backwards = [0, 0], [0, 0]

    def count(counts: list[int], index: int):
        def hook(*_) -> None:
            counts[index] += 1

        return hook

    for index, layer in enumerate(trainer.model.model.layers):
        layer.self_attn.register_forward_pre_hook(count(forwards, index))
        layer.self_attn.register_full_backward_pre_hook(count(backwards, index))
    trainer.train()
    assert backwards == [0, 2]
    assert forwards == [2, 4 if checkpointing else 2]
    (layer,) = smt_dist.sparse_layers(trainer.model).values()
    assert layer.delta.abs().max() > 0


def test_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    """Its last file is missing: taken by ``--resume_from_checkpoint auto``, every restart would fail on it."""
    make_trainer(tmp_path, save_strategy="steps", save_steps=1).train()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-1")


def test_block_without_moments_comes_back_without_moments(tmp_path):
    """An expert that no token has reached yet has no moments; its checkpoint must still be one to resume from."""
    deltas = {"seen": torch.ones(2, 2), "unseen": torch.zeros(2, 2)}
    save_moments(tmp_path, [BlockState("seen", deltas["seen"], {"exp_avg": torch.ones(2, 2)})], step=3)
    states, step = load_states(tmp_path, deltas)
    assert step == 3
    assert {state.module: list(state.moments) for state in states} == {"seen": ["exp_avg"], "unseen": []}


def test_moments_of_another_shape_are_refused(tmp_path):
    """Loaded, they would be spread over the wrong elements or fail far from here."""
    save_moments(tmp_path, [BlockState("a", torch.ones(2, 2), {"exp_avg": torch.ones(4, 2)})], step=3)
    with pytest.raises(SMTError, match=OPTIMIZER_FILE):
        load_states(tmp_path, {"a": torch.ones(2, 2)})


@pytest.mark.parametrize("content", ["{}", "[]", '{"_last_lr": ["x"]}', "not JSON"])
def test_malformed_schedule_is_named(tmp_path, content):
    """A damaged checkpoint gives one line with the file's name, no traceback."""
    (tmp_path / SCHEDULE_FILE).write_text(content)
    with pytest.raises(SMTError, match=SCHEDULE_FILE):
        load_schedule(tmp_path)
