"""Resuming from what doesn't fit or is damaged, and saving to a full disk, ends in one line on all ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from damage import reseal
from harness import launch
from safetensors.torch import load_file, save_file
from tiers import slow

from smt_dist.checkpoint.training_state import OPTIMIZER_FILE, SCHEDULE_FILE

CHECKPOINT = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
MOMENTUM = {"optim": "torch.optim.SGD", "optim_args": "momentum=0.9"}


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """Where the run lies that all tests copy."""
    return tmp_path_factory.mktemp("run") / "out"


@pytest.fixture
def checkpoint(train, once, tmp_path) -> Path:
    """Saved by AdamW after 2 steps."""
    if not once.exists():
        outcome = train(output_dir=once, **CHECKPOINT)
        assert outcome.code == 0, outcome.err
    shutil.copytree(once, tmp_path / "saved")
    return tmp_path / "saved" / "checkpoint-2"


def test_optimizer_by_dotted_name_trains_and_resumes(train, tmp_path):
    """The flag must reach the optimizer, and its state the checkpoint: not only AdamW has moments."""
    whole = train(output_dir=tmp_path / "whole", **{**CHECKPOINT, "max_steps": 4}, **MOMENTUM)
    assert whole.code == 0, whole.err
    folder = tmp_path / "whole"
    saved = load_file(folder / "checkpoint-2" / OPTIMIZER_FILE)
    assert {name.rpartition(":")[2] for name in saved} == {"momentum_buffer"}
    flags = {**CHECKPOINT, "max_steps": 4, "resume_from_checkpoint": folder / "checkpoint-2"}
    resumed = train(output_dir=tmp_path / "again", **flags, **MOMENTUM)
    assert resumed.code == 0, resumed.err
    name = "smt_blocks.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    "other",
    [
        MOMENTUM,
        pytest.param({"optim": "torch.optim.AdamW", "optim_args": "amsgrad=True"}, marks=slow),
        pytest.param({"optim": "torch.optim.Adagrad"}, marks=slow),
    ],
    ids=lambda flags: flags["optim"] + flags.get("optim_args", ""),
)
def test_state_of_another_optimizer_is_refused(train, checkpoint, other):
    """Taken over, it would fail in the first step, or lie beside the new state in each later checkpoint."""
    assert "give the optimizer that it was saved with" in train(resume_from_checkpoint=checkpoint, **other).error


def without_second_moments(path: Path) -> None:
    tensors = {name: value for name, value in load_file(path).items() if not name.endswith(":exp_avg_sq")}
    save_file(tensors, path, {"counters": '{"step": 2.0}'})


def changed_schedule(**changes: object):
    def change(path: Path) -> None:
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


DAMAGES = {
    "old format": (OPTIMIZER_FILE, lambda p: save_file(load_file(p), p, {"optimizer_step": "2"}), "another version"),
    "moments missing": (OPTIMIZER_FILE, without_second_moments, "holds exp_avg, step"),
    "step missing": (OPTIMIZER_FILE, lambda p: save_file(load_file(p), p, {"counters": "{}"}), "exp_avg_sq, step"),
    "schedule of another kind": (SCHEDULE_FILE, changed_schedule(lr_lambdas=None), "lr_scheduler_type"),
    "too many rates": (SCHEDULE_FILE, changed_schedule(_last_lr=[0.1, 0.1]), "learning rates"),
    "half a random state": ("rng_state_0.json", lambda p: p.write_text('{"python": [1]}'), "not a random state"),
    "half a trainer state": ("trainer_state.json", lambda p: p.write_text(p.read_text()[:40]), "not valid JSON"),
    "a wrong trainer state": ("trainer_state.json", lambda p: p.write_text('{"global_step": "x"}'), "global_step"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_is_named_in_one_line(train, checkpoint, damage):
    """A traceback, or masters that are written before the schedule is found to be unreadable."""
    name, change, reason = DAMAGES[damage]
    change(checkpoint / name)
    reseal(checkpoint)
    error = train(resume_from_checkpoint=checkpoint).error
    assert name in error
    assert reason in error


def test_ranks_without_a_random_state_are_counted(train, checkpoint, caplog):
    """Dropout goes on elsewhere there: who compares runs has to know."""
    (checkpoint / "rng_state_0.json").unlink()
    reseal(checkpoint)
    assert train(resume_from_checkpoint=checkpoint, max_steps=3, save_strategy="no").code == 0
    assert "random states of 0 ranks; the other 1 start with new ones" in caplog.text


def test_checkpoint_of_weights_only_is_passed_over(train, checkpoint):
    """``--save_only_model`` leaves nothing to go on from; taken by ``auto``, each restart would fail on it."""
    shutil.copytree(checkpoint, checkpoint.parent / "checkpoint-3")
    (checkpoint.parent / "checkpoint-3" / OPTIMIZER_FILE).unlink()
    reseal(checkpoint.parent / "checkpoint-3")
    flags = {**CHECKPOINT, "max_steps": 4, "output_dir": checkpoint.parent}
    outcome = train(resume_from_checkpoint="auto", **flags)
    assert outcome.code == 0, outcome.err


@slow
def test_full_disk_ends_all_ranks_with_the_same_line(tmp_path, model_folder):
    """The writing rank gives up in the middle of a collective read: the others would wait for it until the time-out."""
    ranks = launch("workers.faults:full_disk", 2, tmp_path, model=str(model_folder))
    for rank in ranks:
        for engine in ("ddp", "zero2"):
            assert "can't be written (No space left on device)" in rank[engine]


def test_half_a_random_state_on_one_rank_ends_all_ranks(tmp_path, model_folder):
    """Only that rank reads the file; the others would meet a closed connection, and nobody would say why."""
    ranks = launch("workers.faults:half_a_random_state", 2, tmp_path, model=str(model_folder))
    assert all("rng_state_1.json: not a random state" in rank for rank in ranks)
