"""A process that is killed while it compiles leaves a lock: tests take it away, a run names it."""

from __future__ import annotations

import os
from pathlib import Path

import compiled_ops
import pytest
from torch.utils.file_baton import FileBaton

from smt_dist.engines.process_group import warn_of_abandoned_builds


@pytest.fixture
def lock(tmp_path, monkeypatch):
    """As PyTorch's own, of a process that is gone."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    assert FileBaton(str(path)).try_acquire()
    return path


def test_lock_does_not_outlive_the_test_that_left_it(lock):
    """Without it every later DeepSpeed test hangs until its time-out, which has happened."""
    assert not FileBaton(str(lock)).try_acquire()
    compiled_ops.remove_locks()
    assert FileBaton(str(lock)).try_acquire()


def test_old_lock_is_named(lock, caplog):
    """The user sees a job that stands still and says nothing."""
    os.utime(lock, (0, 0))
    warn_of_abandoned_builds()
    assert str(lock) in caplog.text


def test_lock_of_a_build_under_way_is_not(lock, caplog):
    """Ranks wait for the one that compiles: that is no fault."""
    warn_of_abandoned_builds()
    assert str(lock) not in caplog.text


def test_lock_that_goes_while_it_is_looked_at_is_none(lock, caplog, monkeypatch):
    """Two nodes that share a folder of builds: the one that looked while the other's build ended died of it."""
    monkeypatch.setattr(Path, "glob", lambda *_: iter([lock]))
    lock.unlink()
    warn_of_abandoned_builds()
    assert str(lock) not in caplog.text
