"""A save is whole or not there: killed, cut short or overwritten at any point, never half and never a mix."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from harness import launch
from transformers.trainer_utils import rotate_checkpoints

from smt_dist.checkpoint import atomic
from smt_dist.checkpoint.atomic import MANIFEST_FILE, read_manifest, saving, verify
from smt_dist.checkpoint.rotation import checkpoint_folders, last_checkpoint, prune_checkpoints, remove_leftovers
from smt_dist.errors import SMTError
from smt_dist.files import read_header

OLD = {"a.json": "old a", "b.json": "old b", "gone.json": "old only"}
NEW = {"a.json": "new a, longer", "b.json": "new b", "sub/c.json": "new only"}


class Killed(BaseException):
    """Stands for SIGKILL: nothing that would clean up may run after it."""


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def save(target: Path, files: dict[str, str], then: Exception | None = None) -> None:
    with saving(target) as beside:
        write(beside, files)
        if then is not None:
            raise then


def content(target: Path) -> dict[str, str] | None:
    """What a reader finds: verified files; None if there is no save."""
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None:
        return None
    verify(target, manifest)
    return {name: (target / name).read_text() for name in manifest.files}


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """Before the ``moment``-th call that changes or syncs a file system."""
    calls = iter(range(1, moment))

    def dying(function):
        def call(*args, **kwargs):
            if next(calls, None) is None:
                raise Killed
            return function(*args, **kwargs)

        return call

    for owner, names in ((os, ("fsync", "replace", "rename")), (shutil, ("rmtree",)), (Path, ("write_text", "unlink"))):
        for name in names:
            monkeypatch.setattr(owner, name, dying(getattr(owner, name)))
    monkeypatch.setattr(atomic.Save, "close", lambda _: None)


@pytest.mark.parametrize("before", [None, OLD], ids=["new folder", "overwritten"])
def test_killed_at_any_step_it_is_the_old_save_or_the_new_one(tmp_path, before):
    """A mix of two adapters loads, computes and is wrong: nobody would ever notice."""
    seen, moment, finished = [], 0, False
    while not finished:
        moment += 1
        target = tmp_path / f"save{moment}"
        if before is not None:
            save(target, before)
        with pytest.MonkeyPatch.context() as monkeypatch:
            kill_at(monkeypatch, moment)
            try:
                save(target, NEW)
                finished = True
            except Killed:
                pass
        seen.append(content(target))
        assert content(target) in (before, NEW)
        save(target, NEW)  # what was left doesn't stand in the way of the next
        assert content(target) == NEW
        assert {path.name for path in target.iterdir()} >= {"a.json", "b.json", "sub", MANIFEST_FILE}
        assert not list(target.glob(".*"))
    assert moment > 10
    assert seen[0] == before
    assert seen[-1] == NEW


def test_files_written_in_place_would_be_mixed(tmp_path):
    """Guards the test above: file by file without a manifest, a kill leaves one of each."""
    write(tmp_path, OLD)
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, 2)
        with pytest.raises(Killed):
            write(tmp_path, NEW)
    assert (tmp_path / "a.json").read_text() == NEW["a.json"]
    assert (tmp_path / "b.json").read_text() == OLD["b.json"]


def test_adapter_survives_sigkill_while_it_is_overwritten(tmp_path):
    """The real thing: processes that save without end, killed at random moments."""
    (found,) = launch("workers.killed_saves:overwrite_and_kill", 1, tmp_path, kills=30, seed=0)
    assert sum(found.values()) == 30


def test_files_of_the_old_save_that_the_new_one_lacks_are_gone(tmp_path):
    """Left behind, the random states of more ranks would be counted as this save's."""
    save(tmp_path / "s", OLD)
    (tmp_path / "s" / "mine.txt").write_text("a user's own")
    save(tmp_path / "s", NEW)
    names = {path.relative_to(tmp_path / "s").as_posix() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert names == {*NEW, MANIFEST_FILE, "mine.txt"}


def test_failed_save_leaves_nothing_beside(tmp_path):
    """Half a save takes the room that the next one needs."""
    save(tmp_path / "old", OLD)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="full"):
            save(tmp_path / name, NEW, then=OSError("full"))
    assert content(tmp_path / "old") == OLD
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert not list((tmp_path / "old").glob(".*"))


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a\\..\\x", "", ".", "a//b", "a\n", MANIFEST_FILE])
def test_manifest_names_files_inside_its_folder_only(tmp_path, name):
    """A folder from elsewhere must not make us read, or when a move is finished write, anywhere else."""
    save(tmp_path / "s", OLD)
    path = tmp_path / "s" / MANIFEST_FILE
    path.write_text(path.read_text().replace('"a.json"', f'"{name}"'.replace("\\", "\\\\").replace("\n", "\\n")))
    with pytest.raises(SMTError, match="inside the folder"):
        read_manifest(tmp_path / "s")


def test_link_in_an_unfinished_save_does_not_lead_outside(tmp_path):
    """An archive can hold links: finishing its move would overwrite files that the link points to."""
    folder, outside = tmp_path / "s", tmp_path / "outside"
    outside.mkdir()
    (folder / ".smt_saving").mkdir(parents=True)
    write(folder / ".smt_saving", {"sub/c.json": "planted"})
    atomic.write_manifest(folder / ".smt_saving")
    (folder / "sub").symlink_to(outside)
    with pytest.raises(SMTError, match="leads out"):
        read_manifest(folder)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("whole", [True, False])
def test_link_in_an_unfinished_save_takes_nothing_from_outside(tmp_path, whole):
    """The other way round: reading a folder from elsewhere would move the reader's own files into it."""
    mine, folder = tmp_path / "mine", tmp_path / "s"
    save(mine, {"id.json": "secret"})
    folder.mkdir()
    if whole:
        (folder / ".smt_saving").symlink_to(mine)
    else:
        (folder / ".smt_saving").mkdir()
        write(folder / ".smt_saving", {"sub/id.json": "planted"})
        atomic.write_manifest(folder / ".smt_saving")
        shutil.rmtree(folder / ".smt_saving" / "sub")
        (folder / ".smt_saving" / "sub").symlink_to(mine)
    with pytest.raises(SMTError, match="leads out"):
        read_manifest(folder)
    assert content(mine) == {"id.json": "secret"}


def test_reader_that_finishes_a_save_leaves_nothing_of_the_old_one(tmp_path, monkeypatch):
    """What the new save doesn't have would be taken for a part of it."""
    folder = tmp_path / "s"
    save(folder, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_finish", lambda _: None)  # killed when its own manifest was written
        save(folder, NEW)
    assert content(folder) == NEW
    assert not (folder / "gone.json").exists()


def test_pipe_in_place_of_a_file_is_refused(tmp_path):
    """Opening one waits until somebody writes into it: a folder from elsewhere would hang its reader."""
    save(tmp_path / "s", {"a.safetensors": ""})
    manifest, path = read_manifest(tmp_path / "s"), tmp_path / "s" / "a.safetensors"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(SMTError, match="not a regular file"):
        verify(tmp_path / "s", manifest)
    with pytest.raises(SMTError, match="not a regular file"):
        read_header(path)


# -- the checkpoints of a run ------------------------------------------------------------------------------------


def fake_checkpoint(run: Path, step: int, age: float) -> Path:
    """Whole, as far as :func:`prune_checkpoints` looks."""
    save(run / f"checkpoint-{step}", {"trainer_state.json": str(step)})
    os.utime(run / f"checkpoint-{step}" / MANIFEST_FILE, (1e9 - age, 1e9 - age))
    return run / f"checkpoint-{step}"


def test_limit_keeps_what_was_just_saved_although_a_damaged_one_has_a_higher_step(tmp_path):
    """After a fall-back the run saves smaller steps than the damaged one's; deleted would be the only good one."""
    for name in ("trainer", "ours"):
        damaged, just_saved = fake_checkpoint(tmp_path / name, 4, 0.5), fake_checkpoint(tmp_path / name, 3, 0)
        (damaged / "trainer_state.json").write_text("")
        if name == "trainer":
            rotate_checkpoints(str(tmp_path / name), save_total_limit=1, use_mtime=True)
            assert not just_saved.exists(), "the fault that ours is to prevent"
        else:
            prune_checkpoints(tmp_path / name, 1, {just_saved})
            assert checkpoint_folders(tmp_path / name) == [just_saved]


def test_limit_deletes_damaged_ones_first_then_the_oldest(tmp_path):
    """With two to be kept, one good and one damaged are one too few."""
    steps = [fake_checkpoint(tmp_path, step, 100 - step) for step in (1, 2, 3, 4)]
    (steps[2] / MANIFEST_FILE).unlink()
    prune_checkpoints(tmp_path, 3, {steps[3]})
    assert checkpoint_folders(tmp_path) == [steps[0], steps[1], steps[3]]
    prune_checkpoints(tmp_path, 2, {steps[3], steps[0]})  # the best is kept, however old
    assert checkpoint_folders(tmp_path) == [steps[0], steps[3]]
    prune_checkpoints(tmp_path, None, {steps[3]})
    assert len(checkpoint_folders(tmp_path)) == 2


def test_half_a_deletion_is_no_checkpoint(tmp_path):
    """A kill in the middle would leave a folder that looks damaged, and be reported as lost."""
    old, new = fake_checkpoint(tmp_path, 1, 9), fake_checkpoint(tmp_path, 2, 0)
    with pytest.MonkeyPatch.context() as monkeypatch:
        kill_at(monkeypatch, 3)  # the first two: remove an older such folder, rename
        with pytest.raises(Killed):
            prune_checkpoints(tmp_path, 1, {new})
    assert not old.exists()
    assert checkpoint_folders(tmp_path) == [new]
    (tmp_path / ".checkpoint-7.saving").mkdir()
    (tmp_path / ".checkpoint-mine").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".checkpoint-mine", "checkpoint-2"]


def test_no_checkpoint_at_all_is_a_start_anew(tmp_path):
    """The first launch of a job that always says ``auto``."""
    assert last_checkpoint(str(tmp_path)) is None
    assert last_checkpoint(str(tmp_path / "absent")) is None
