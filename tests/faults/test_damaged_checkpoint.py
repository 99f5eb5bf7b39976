"""A damaged checkpoint is named; ``auto`` falls back to the one before, and what is named by hand is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from damage import outcome, reseal
from programs import Outcome, logged_losses, write_config
from tiers import all_differences

from smt_dist.checkpoint import atomic, rotation
from smt_dist.checkpoint.adapter import CARD_FILE, read_adapter
from smt_dist.checkpoint.atomic import MANIFEST_FILE
from smt_dist.checkpoint.rotation import last_checkpoint, verify_checkpoint
from smt_dist.errors import SMTError

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
FILES = (
    *("smt_blocks.safetensors", "smt_optimizer.safetensors", "smt_selection.json", "smt_config.json"),
    *("smt_schedule.json", "rng_state_0.json", "trainer_state.json", MANIFEST_FILE),
)


def flip_one_bit(path: Path) -> None:
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)


DAMAGES = {
    "a bit": flip_one_bit,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """Where the run lies that all tests copy."""
    return tmp_path_factory.mktemp("run") / "out"


@pytest.fixture
def checkpoints(train, once, tmp_path) -> Path:
    """A run's folder with checkpoints 1 to 3, to be damaged."""
    if not once.exists():
        outcome = train(output_dir=once, **SAVING)
        assert outcome.code == 0, outcome.err
    shutil.copytree(once, tmp_path / "run")
    return tmp_path / "run"


def resumed(train, checkpoints: Path, which: object, steps: int = 4) -> Outcome:
    flags = {**SAVING, "max_steps": steps, "output_dir": checkpoints}
    return train(resume_from_checkpoint=which, **flags)


@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_before_anything_is_loaded(checkpoints, name):
    """One flipped bit of a moment, a random state or a step count makes another run, silently."""
    newest = checkpoints / "checkpoint-3"
    whole = (newest / name).read_bytes()
    with all_differences() as check:
        for how, damage in DAMAGES.items():
            (newest / name).write_bytes(whole)
            verify_checkpoint(newest)
            damage(newest / name)
            with check(how):
                refusal = outcome(lambda: verify_checkpoint(newest))
                assert refusal is not None, "it is taken for whole"
                assert refusal.startswith(str(newest))
                assert name in refusal or name == MANIFEST_FILE  # whose damage may show as another file's
                assert str(last_checkpoint(str(checkpoints))) == str(checkpoints / "checkpoint-2")


def test_auto_names_the_damaged_one_and_goes_on_from_the_one_before(train, checkpoints, caplog):
    """The losses then are those of the undisturbed run."""
    expected = logged_losses(checkpoints / "checkpoint-3")
    flip_one_bit(checkpoints / "checkpoint-3" / "smt_optimizer.safetensors")
    outcome = resumed(train, checkpoints, "auto", steps=3)
    assert outcome.code == 0, outcome.err
    assert "checkpoint-3/smt_optimizer.safetensors: damaged" in caplog.text
    assert "going on from" in caplog.text
    assert "checkpoint-2 instead" in caplog.text
    assert logged_losses(checkpoints / "checkpoint-3") == expected  # saved anew, over the damaged one


def test_damaged_checkpoint_that_is_named_is_refused_in_one_line(train, checkpoints):
    """Who names one wants that one: another would be a guess."""
    flip_one_bit(checkpoints / "checkpoint-2" / "smt_blocks.safetensors")
    error = resumed(train, checkpoints, checkpoints / "checkpoint-2").error
    assert "checkpoint-2/smt_blocks.safetensors: damaged: its content isn't what was saved" in error


def test_nothing_starts_anew_over_checkpoints_that_are_all_damaged(train, checkpoints):
    """``auto`` would begin at step 0 and, with a limit, delete what could have been saved."""
    for step in (1, 2, 3):
        (checkpoints / f"checkpoint-{step}" / "trainer_state.json").unlink()
    assert "none of its checkpoints is whole" in resumed(train, checkpoints, "auto").error


def test_foreign_checkpoint_with_a_fitting_manifest_is_checked_behind_it(train, checkpoints):
    """A manifest shows damage, not malice: whoever makes the files makes the manifest."""
    (checkpoints / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": -1}')
    reseal(checkpoints / "checkpoint-3")
    assert "trainer_state.json: global_step" in resumed(train, checkpoints, checkpoints / "checkpoint-3").error


@pytest.mark.parametrize("reselect", [None, {"every": 2, "fraction": 0.5, "steps": 1}])
def test_a_resume_reads_each_file_once_to_verify_it(train, tmp_path, monkeypatch, reselect):
    """At 70B a checkpoint has 7 GB: read two to five times for the same question, a restart takes minutes longer."""
    flags = {**SAVING, "smt_config": write_config(tmp_path, reselect=reselect), "adam_beta2": 0.95}
    assert train(**flags).code == 0
    read: list[str] = []
    digest = atomic._digest
    monkeypatch.setattr(atomic, "_digest", lambda path: read.append(path.name) or digest(path))
    outcome = train(**{**flags, "max_steps": 4}, resume_from_checkpoint="auto")
    assert outcome.code == 0, outcome.err
    saved = {path.name for path in (tmp_path / "out" / "checkpoint-3").iterdir()} - {MANIFEST_FILE, CARD_FILE}
    assert saved > {"smt_optimizer.safetensors", *(["smt_active.json"] if reselect else [])}
    assert sorted(read) == sorted(saved)


@pytest.mark.parametrize(("local_rank", "is_refused"), [("0", True), ("1", False)])
def test_another_node_reads_its_own_copy(checkpoints, monkeypatch, local_rank, is_refused):
    """Its first rank does, for all there. A bit of an fp32 master may be none of the bf16 values that ranks compare."""
    found = verify_checkpoint(checkpoints / "checkpoint-3")
    monkeypatch.setattr(rotation, "from_main_process", lambda _find, _what: found)
    monkeypatch.setattr(rotation, "get_rank", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert rotation.find_checkpoint("auto", str(checkpoints)) == found
    flip_one_bit(checkpoints / "checkpoint-3" / "smt_blocks.safetensors")
    if is_refused:
        with pytest.raises(SMTError, match=r"smt_blocks\.safetensors: damaged"):
            rotation.find_checkpoint("auto", str(checkpoints))
    else:
        assert rotation.find_checkpoint("auto", str(checkpoints)).folder == found.folder


@pytest.mark.parametrize("name", ["smt_blocks.safetensors", "smt_optimizer.safetensors"])
def test_a_checkpoint_that_changes_after_it_was_verified_is_refused(checkpoints, name):
    """Between the two lies the loading of the model, minutes in which another run may write into the same folder."""
    verified = verify_checkpoint(checkpoints / "checkpoint-3")
    read_adapter(verified)
    flip_one_bit(checkpoints / "checkpoint-3" / name)
    with pytest.raises(SMTError, match=rf"{name}: was changed after it was verified"):
        read_adapter(verified)
