"""SMTTrainer on one process: what it spares, and what it makes of incomplete checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import make_batches, make_model

import smt_dist
from smt_dist import BlockSelection
from smt_dist.checkpoint.rotation import last_checkpoint
from smt_dist.checkpoint.training_state import OPTIMIZER_FILE, SCHEDULE_FILE, load_schedule, load_states, save_moments
from smt_dist.engines.base import Moments
from smt_dist.errors import SMTError
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.trainer import SMTTrainer

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
    assert str(last_checkpoint(str(tmp_path))) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    assert str(last_checkpoint(str(tmp_path))) == str(tmp_path / "checkpoint-1")


def write_moments(folder: Path, module: str, moment: torch.Tensor, counters: dict[str, float]) -> None:
    tensors = iter([(module, {"exp_avg": moment})])
    save_moments(folder, {module: tuple(moment.shape)}, Moments(["exp_avg"], counters, tensors))


def test_counters_keep_every_bit(tmp_path):
    """NAdam multiplies a product up over the steps; rounded on its way through the file, a resumed run would differ."""
    product = float(torch.tensor(0.1, dtype=torch.float32))
    write_moments(tmp_path, "a", torch.ones(2, 2), {"step": 3.0, "mu_product": product})
    states, counters = load_states(tmp_path, {"a": torch.zeros(2, 2)})
    assert counters == {"step": 3.0, "mu_product": product}
    assert [list(state.moments) for state in states] == [["exp_avg"]]


@pytest.mark.parametrize(("module", "shape"), [("a", (4, 2)), ("b", (2, 2))], ids=["shape", "module"])
def test_moments_that_do_not_fit_are_refused(tmp_path, module, shape):
    """Loaded, they would be spread over the wrong elements or fail far from here."""
    write_moments(tmp_path, module, torch.ones(shape), {"step": 3.0})
    with pytest.raises(SMTError, match=OPTIMIZER_FILE):
        load_states(tmp_path, {"a": torch.ones(2, 2)})


@pytest.mark.parametrize("content", ["{}", "[]", '{"_last_lr": ["x"]}', "not JSON"])
def test_malformed_schedule_is_named(tmp_path, content):
    """A damaged checkpoint gives one line with the file's name, no traceback."""
    (tmp_path / SCHEDULE_FILE).write_text(content)
    with pytest.raises(SMTError, match=SCHEDULE_FILE):
        load_schedule(tmp_path, [1.0])
