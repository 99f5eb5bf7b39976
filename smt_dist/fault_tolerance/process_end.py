"""End a process without an abort by its libraries' threads."""

from __future__ import annotations

import threading
import time
from pathlib import Path

SETTLING_SECONDS = 2.0  # at most, for threads to become idle
QUIET_LOOKS = 3  # in a row: a thread that ends may wake another one


def let_threads_settle(seconds: float = SETTLING_SECONDS) -> None:
    """Wait until all other threads of this process sleep.

    To be called before the interpreter ends.

    Gloo's threads outlive ``destroy_process_group`` wherever something still holds a group: DDP, DTensor's caches and
    DeepSpeed do, to the end. One that frees the last collective's tensor while the interpreter ends asks for Python's
    lock, is ended for it in C++ code that can't be left so, and takes the process down with SIGABRT ("terminate
    called without an active exception"): all is saved, and the launcher sees a job that failed (torch 2.13.0).

    Args:
        seconds: to wait at most, where a thread never sleeps.
    """
    deadline = time.monotonic() + seconds
    quiet = 0
    while quiet < QUIET_LOOKS and time.monotonic() < deadline:
        time.sleep(0.01)  # without Python's lock, so that no thread waits for it
        quiet = 0 if _other_threads_run() else quiet + 1


def _other_threads_run() -> bool:
    """Return whether another thread runs or can run.

    False where the system doesn't tell (not Linux).
    """
    for task in Path("/proc/self/task").glob("[0-9]*"):
        try:
            state = (task / "stat").read_bytes().rpartition(b")")[2].split()[0]  # names are any bytes
        except OSError:  # it has ended
            continue
        if state in (b"R", b"D") and int(task.name) != threading.get_native_id():
            return True
    return False
