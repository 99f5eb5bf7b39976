"""Forked ranks are as separate as processes that are started anew."""

from __future__ import annotations

import signal
import threading
import time

import harness
import psutil
import pytest
from forks.client import ForkServer
from harness import launch, this_server


def wait_until(true, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_parent_has_one_thread(tmp_path):
    """A fork copies no other: a lock that another one holds would be held for good."""
    launch("workers.forked:describe", 2, tmp_path)
    assert psutil.Process(this_server.process.pid).num_threads() == 1


def test_ranks_have_the_environment_and_folder_of_the_call(tmp_path, monkeypatch):
    """Tests set variables and expect the ranks to see them, and only theirs."""
    monkeypatch.setenv("FOR_THE_FIRST", "1")
    first = launch("workers.forked:describe", 2, tmp_path / "first")
    monkeypatch.delenv("FOR_THE_FIRST")
    monkeypatch.setenv("MASTER_SECRET", "a launcher's")
    second = launch("workers.forked:describe", 1, tmp_path / "second")
    assert [rank["environment"]["RANK"] for rank in first] == ["0", "1"]
    assert all(rank["environment"]["FOR_THE_FIRST"] == "1" for rank in first)
    assert not {"FOR_THE_FIRST", "RANK", "MASTER_SECRET"} & set(second[0]["environment"])
    assert {rank["place"] for rank in first} == {str(tmp_path / "first")}
    assert second[0]["place"] == str(tmp_path / "second")


def test_what_a_launch_changes_is_not_seen_by_the_next(tmp_path):
    """Ranks are new processes each time, in sessions of their own, that draw their own numbers."""
    found = [rank for name in "ab" for rank in launch("workers.forked:describe", 2, tmp_path / name, mark=name)]
    assert [rank["seen"] for rank in found] == [["a"], ["a"], ["b"], ["b"]]
    for own in ("process", "session", "drawn"):
        assert len({rank[own] for rank in found}) == 4


def test_a_rank_that_fails_ends_the_others_and_shows_its_traceback(tmp_path, monkeypatch):
    """Else the failure would be a time-out, and nobody would know of what."""
    monkeypatch.setattr(harness, "GRACE", 1)
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"workers\.forked:fail on 2 ranks: rank 1 failed") as caught:
        launch("workers.forked:fail", 2, tmp_path)
    assert time.monotonic() - began < 30
    assert "RuntimeError: on purpose" in str(caught.value)
    assert "rank 0 has begun" in str(caught.value)


def test_a_hang_is_named_and_killed_with_its_children(tmp_path):
    """It would hold the tests up for good, and what it started would run beside all that follow."""
    with pytest.raises(AssertionError, match=r"no end after 5 s: ranks \[0, 1\] hang") as caught:
        launch("workers.forked:hang", 2, tmp_path, timeout=5)
    assert "in hang" in str(caught.value), "faulthandler shows where"
    wait_until(lambda: is_gone(int((tmp_path / "child").read_text())))


def test_a_parent_that_is_killed_takes_its_ranks_along_and_is_replaced(tmp_path):
    """By the kernel, say: the test that waits hears of it, and those after it go on."""

    def kill() -> None:
        wait_until(lambda: (tmp_path / "process").exists() and (tmp_path / "process").read_text())
        this_server.process.kill()

    launch("workers.forked:describe", 1, tmp_path / "before")
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(AssertionError, match="the parent of the ranks is gone"):
        launch("workers.forked:wait", 1, tmp_path)
    killer.join()
    wait_until(lambda: is_gone(int((tmp_path / "process").read_text())))
    launch("workers.forked:describe", 1, tmp_path / "after")


def test_a_parent_that_can_not_start_is_tried_once(monkeypatch):
    """A mistake in an import would otherwise take every test that starts ranks as long as the import."""
    server = ForkServer(enter=["false"])
    with pytest.raises(AssertionError, match="the parent of the ranks is gone") as first:
        server.start()
    monkeypatch.setattr(server, "begin", lambda: pytest.fail("it was tried again"))
    with pytest.raises(AssertionError) as second:
        server.start()
    assert second.value is first.value


def test_a_test_that_is_over_takes_its_ranks_along(tmp_path):
    """By its time limit, or the keyboard: the next one's launch must not wait for this one's."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    launch("workers.forked:describe", 1, tmp_path / "before")
    signal.setitimer(signal.ITIMER_REAL, 2)
    try:
        with pytest.raises(KeyboardInterrupt):
            launch("workers.forked:wait", 1, tmp_path)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_gone(int((tmp_path / "process").read_text()))
