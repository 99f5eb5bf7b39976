"""A run that is asked to end leaves a checkpoint that is there, knows its score, and can be gone on from."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tiers import slow
from tiny_models import make_rows
from transformers import AutoModelForCausalLM, TrainerCallback

import smt_dist
from smt_dist import BlockSelection, SMTConfig
from smt_dist.checkpoint.adapter import attach_adapter, read_adapter, trained_deltas
from smt_dist.checkpoint.training_state import load_schedule, save_schedule
from smt_dist.data.dataset import CausalLMCollator
from smt_dist.fault_tolerance import supervision
from smt_dist.fault_tolerance.preemption import Preempted
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.rounds import trainer_class
from smt_dist.training.trainer import SMTTrainer

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"
BEST = {"metric_for_best_model": "loss", "greater_is_better": False}
STEPS = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
EPOCHS = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
GETS_WORSE = {"learning_rate": 1.0}  # so that the first evaluation's checkpoint is the best


class _Ask(TrainerCallback):
    """Sends SIGTERM to this process, at the beginning of a step or of the training."""

    def __init__(self, step: int, event: str = "on_step_begin") -> None:
        def ask(_args, state, _control, **_):
            if state.global_step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        setattr(self, event, ask)


@pytest.fixture(autouse=True)
def _handlers():
    """Signals as they were, after each test."""
    yield
    if supervision._active.preemption is not None:
        supervision._active.preemption.restore()
        supervision._active.preemption = None


@pytest.fixture
def make(model_folder, tmp_path):
    """A trainer of 4 steps an epoch, on one process."""

    def make_it(*callbacks, model=None, deltas=None, folder="out", **flags) -> SMTTrainer:
        options = {"max_steps": 8, "adam_beta2": 0.95, "report_to": "none", "disable_tqdm": True, "logging_steps": 100}
        args = SMTTrainingArguments(
            output_dir=str(tmp_path / folder), dtype="float32", per_device_train_batch_size=2, **{**options, **flags}
        )
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(model_folder)
            smt_dist.apply_selection(model, BlockSelection(block_size=(16, 16), blocks={Q: [(0, 0)]}))
        supervision._active.preemption = None
        supervision.supervise(args.heartbeat_timeout)
        data = {"train_dataset": make_rows(8), "eval_dataset": make_rows(4, seed=5)}
        return trainer_class(model)(
            model, args, deltas, data_collator=CausalLMCollator(0), callbacks=[*callbacks], **data
        )

    return make_it


def saved_state(trainer: SMTTrainer) -> dict:
    return json.loads((Path(trainer.saved_when_preempted()) / "trainer_state.json").read_text())


@pytest.mark.parametrize(
    ("step", "flags"),
    [
        (5, {**STEPS, **BEST, **GETS_WORSE, "load_best_model_at_end": True, "save_total_limit": 1}),
        (5, {**STEPS, **BEST, **GETS_WORSE, "save_total_limit": 1}),
        (4, {**STEPS, **BEST, **GETS_WORSE, "save_strategy": "best"}),
        (6, {**EPOCHS, **BEST}),
    ],
    ids=["limit of 1, best is loaded", "limit of 1", "best only", "in mid-epoch"],
)
def test_the_checkpoint_that_a_run_says_it_left_is_there(make, step, flags):
    """Trainer deletes all but the best at the end, and saves nothing but a new best: the last steps would be lost."""
    trainer = make(_Ask(step), **flags)
    trainer.train()
    assert trainer.preempted == signal.SIGTERM
    assert trainer.state.global_step == step
    assert saved_state(trainer)["global_step"] == step


def test_the_score_of_an_epoch_that_just_ended_is_saved(make):
    """The next launch begins the next epoch: this one would never be scored, and another checkpoint be the best."""
    trainer = make(_Ask(4), **EPOCHS, **BEST)
    trainer.train()
    assert trainer.preempted
    state = saved_state(trainer)
    assert state["best_global_step"] == 4
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [4]


def test_an_epoch_that_was_cut_short_is_not_scored(make):
    """Its evaluation would take the time that is left, and be thrown away."""
    trainer = make(_Ask(6), **EPOCHS, **BEST)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [4]


# -- with re-selection -------------------------------------------------------------------------------------------


def two_groups(multiplier: float = 10.0, **selection: str) -> SMTConfig:
    """One block in each of two kinds of weights, both re-selected every 2 steps."""
    groups = [
        {"name": "a", "target_modules": ["q_proj"], "blocks": 1},
        {"name": "b", "target_modules": ["up_proj"], "blocks": 1, "lr_multiplier": multiplier},
    ]
    settings = {"every": 2, "fraction": 1.0, "steps": 1}
    return SMTConfig.model_validate({"block_size": 16, "groups": groups, "reselect": settings, "selection": selection})


@pytest.fixture
def grouped(model_folder):
    """A model with a block of each group; in the lower layer that of the group with the larger rate."""

    def make_it(config: SMTConfig):
        model = AutoModelForCausalLM.from_pretrained(model_folder)
        blocks = {UP: [(0, 0)], Q.replace("0", "1"): [(0, 0)]}
        selection = BlockSelection(block_size=(16, 16), blocks=blocks, groups=dict(zip(blocks, "ba", strict=True)))
        smt_dist.apply_selection(model, selection, config)
        return model

    return make_it


class _Rates(TrainerCallback):
    def __init__(self, model) -> None:
        self.model, self.found = model, []

    def on_step_end(self, *_, optimizer=None, **__):
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
        self.found.append({"up_proj" if "up_proj" in name else "q_proj": rate for name, rate in rates.items()})


def test_a_group_keeps_its_rate_when_blocks_drop_and_grow(make, grouped):
    """Which group comes first may change: by their place in a list, rates would change sides without a word."""
    model = grouped(two_groups())
    rates = _Rates(model)
    make(rates, model=model, max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant").train()
    assert len(rates.found) == 4
    assert rates.found == [{"q_proj": pytest.approx(1e-3), "up_proj": pytest.approx(1e-2)}] * 4


@slow
def test_a_group_that_loses_all_its_blocks_does_not_end_the_run(make, grouped):
    """With a joint budget one group may take all: the checkpoint has rates of two groups, the optimizer one."""
    model = grouped(two_groups(budget="joint", strategy="no_restriction"))
    rates = _Rates(model)
    make(rates, model=model, max_steps=4, learning_rate=1e-3, lr_scheduler_type="constant").train()
    assert len(rates.found) == 4
    assert any(len(found) == 1 for found in rates.found), "no group lost its blocks"
    expected = {"q_proj": pytest.approx(1e-3), "up_proj": pytest.approx(1e-2)}
    assert all(rate == expected[name] for found in rates.found for name, rate in found.items())


def test_rates_are_found_by_multiplier(tmp_path):
    """A group that is gone takes nothing along; one that is new gets its share of the others' rate."""
    schedule = {"_last_lr": [0.1, 1.0], "base_lrs": [0.2, 2.0], "lr_lambdas": [None, None], "last_epoch": 3}
    save_schedule(tmp_path, schedule, 8, [1.0, 10.0])
    assert load_schedule(tmp_path, [10.0])["_last_lr"] == [1.0]
    both = load_schedule(tmp_path, [5.0, 10.0])
    assert both["_last_lr"] == pytest.approx([0.5, 1.0])
    assert both["base_lrs"] == pytest.approx([1.0, 2.0])
    assert both["lr_lambdas"] == [None, None]
    assert both["last_epoch"] == 3


def test_asked_to_end_while_a_later_round_begins_is_no_fault(make, grouped):
    """There is a checkpoint: to say that there is nothing to save would have the run started anew."""
    trainer = make(_Ask(3, "on_train_begin"), model=grouped(two_groups()))
    trainer.train()
    assert trainer.preempted == signal.SIGTERM
    assert saved_state(trainer)["global_step"] == 2


def test_asked_to_end_before_the_first_step_says_so(make):
    """Guards the test above: without a checkpoint it is something else."""
    with pytest.raises(Preempted):
        make(_Ask(1, "on_train_begin")).train()


@slow
def test_a_reselection_of_an_earlier_run_is_not_taken_for_this_ones(make, grouped, model_folder):
    """Both are due at the same step: a run that continues an adapter and is killed there would go on without."""
    config = two_groups()
    first = make(model=grouped(config), max_steps=3)
    first.train()
    adapter = read_adapter(Path(first.args.output_dir) / "checkpoint-2")
    assert adapter.active.step == 2
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    attach_adapter(model, adapter._replace(config=config))
    second = make(_Ask(2), model=model, deltas=trained_deltas(adapter), folder="second", max_steps=4)
    second.train()
    assert second.preempted
    assert read_adapter(second.saved_when_preempted()).active.step == 0
    active = model.smt.selection
    third = make(model=model, folder="second", max_steps=3)
    third.train(resume_from_checkpoint=second.saved_when_preempted())
    assert model.smt.selection != active


def test_a_first_step_that_was_skipped_can_be_gone_on_from(make, model_folder):
    """The optimizer keeps nothing before it steps, which isn't another optimizer's state."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    config = SMTConfig.model_validate({"block_size": 16, "non_finite": {"policy": "skip"}})
    smt_dist.apply_selection(model, BlockSelection(block_size=(16, 16), blocks={Q: [(0, 0)]}), config)
    spoil = model.register_forward_hook(lambda _m, _a, output: output.__setitem__("loss", output["loss"] * torch.nan))
    steps = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    first = make(model=model, max_steps=1, **steps)
    first.train()
    spoil.remove()
    second = make(model=model, max_steps=2, **steps)
    second.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-1"))
    assert second.state.global_step == 2
    assert all(layer.delta.any() for layer in smt_dist.sparse.surgery.sparse_layers(model).values())
