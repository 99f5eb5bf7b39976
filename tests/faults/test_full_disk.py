"""The disk fills up: every rank stops with the same line, and the last good save is as it was."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import launch

from smt_dist import read_adapter

SIZE = "2m"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of :data:`SIZE`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here (it takes root); test_resume_faults.py simulates the full disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_full_disk_ends_all_ranks_and_the_last_checkpoint_goes_on(small_disk, tmp_path, model_folder):
    """Half a checkpoint, a rank that waits for the one that couldn't write, or a last good one that was deleted first.

    With room again the run goes on by itself, with the losses of a run that nothing disturbed.
    """
    ranks = launch("workers.faults:disk_that_fills", 2, tmp_path / "f", model=str(model_folder), disk=str(small_disk))
    for rank in ranks:
        assert set(rank) == {"ddp", "zero2"}
        for engine, found in rank.items():
            assert "can't be written (No space left on device); what was saved before is untouched" in found["said"]
            assert found["left"] == ["checkpoint-1"]
            assert found["last"] == str(small_disk / engine / "checkpoint-1")
            assert found["resumed_to"] == 3
            assert found["losses"] == found["undisturbed"]


def fill(disk: Path) -> Path:
    ballast = disk / "ballast"
    with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def test_program_on_a_full_disk_says_so_in_one_line_and_keeps_the_old_adapter(train, small_disk):
    """The second run into the same folder must not take the first run's adapter with it."""
    flags = {"output_dir": small_disk / "out", "max_steps": 1}
    assert train(**flags).code == 0
    before = (small_disk / "out" / "smt_blocks.safetensors").read_bytes()
    ballast = fill(small_disk)
    assert "No space left on device" in train(**flags, learning_rate=0.5).error
    read_adapter(small_disk / "out")
    assert (small_disk / "out" / "smt_blocks.safetensors").read_bytes() == before
    ballast.unlink()
    assert train(**flags, learning_rate=0.5).code == 0
    assert (small_disk / "out" / "smt_blocks.safetensors").read_bytes() != before


def test_selection_on_a_full_disk_is_one_line_and_no_half_file(train, small_disk):
    """Hours of warm-up end there; the ranks that don't write have to end as well."""
    fill(small_disk)
    error = train("--output", str(small_disk / "selection.json"), program="select_blocks.py").error
    assert "selection.json: can't be written (No space left on device)" in error
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


def test_limit_on_a_files_size_counts_as_a_full_disk(train, tmp_path):
    """A quota, where nothing can be mounted: the same line."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # Large enough for the logs of this test, too small for the blocks.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        outcome = train(max_steps=1, report_to="none")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "can't be written (" in outcome.error
    assert os.strerror(errno.EFBIG) in outcome.error
    assert not list(tmp_path.glob("**/smt_*.safetensors"))
    assert not list(tmp_path.glob("**/.*"))
