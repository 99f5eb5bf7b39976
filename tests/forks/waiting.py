"""Wait for the ranks of a job, and end those that don't end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import time
from typing import Any

from forks.job import FAULT, Job

POLL_SECONDS = 0.01
WRITING_SECONDS = 1.0  # for faulthandler, in a process that is about to be killed


class Watch:
    """Watch over the ranks of one job.

    Args:
        job: what they do.
        processes: rank -> process.
    """

    def __init__(self, job: Job, processes: dict[int, int]) -> None:
        self.job = job
        self.processes = processes
        self.running = dict(processes)
        self.ended: dict[int, list[Any]] = {}
        self.faults: dict[int, dict[str, Any]] = {}
        self.deadline = time.time() + job.timeout

    def wait(self) -> dict[str, Any]:
        """Wait for all ranks, but no longer than the job allows.

        Returns:
            Rank -> exit code (minus the signal's number where it died of one) and time of its end; ranks that hang or
            are stopped are killed and have the code None. And what was done to whom.
        """
        try:
            while self.running:
                self._see_who_ended()
                self._see_faults()
                if time.time() > self.deadline or self._only_stopped_are_left():
                    self._end_running()
                # Nothing comes before the results are out: who closes the pipe is gone, or wants them no more.
                if self.running and select.select([0], [], [], POLL_SECONDS)[0]:
                    raise SystemExit
        finally:
            self._kill_all()
        return {"ended": self.ended, "faults": self.faults}

    def _see_who_ended(self) -> None:
        for rank, pid in list(self.running.items()):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                del self.running[rank]
                code = os.waitstatus_to_exitcode(status)
                self.ended[rank] = [code, time.time()]
                if code != 0 and self.job.grace is not None:
                    self.deadline = min(self.deadline, time.time() + self.job.grace)

    def _see_faults(self) -> None:
        for rank in range(self.job.world_size):  # also those on the other node: it is one machine, with one disk
            path = self.job.folder / FAULT.format(rank)
            if rank not in self.faults and path.exists() and (text := path.read_text()):
                self.faults[rank] = json.loads(text)
                self.deadline = max(fault["time"] for fault in self.faults.values()) + self.job.limit
            fault = self.faults.get(rank)
            if fault and fault.get("pause") and time.time() > fault["time"] + fault["pause"] and rank in self.running:
                os.kill(self.running[rank], signal.SIGCONT)

    def _stopped(self) -> set[int]:
        """Return the ranks that a fault has stopped for good."""
        hurt = {rank: self.faults[rank] for rank in self.running if rank in self.faults}
        return {rank for rank, fault in hurt.items() if fault["signal"] == signal.SIGSTOP and not fault.get("pause")}

    def _only_stopped_are_left(self) -> bool:
        whole = len(self.processes) == self.job.world_size
        return whole and bool(self.running) and set(self.running) == self._stopped()

    def _end_running(self) -> None:
        """Kill what still runs; faulthandler writes first where a hanging rank hangs."""
        asked = [pid for rank, pid in self.running.items() if rank not in self._stopped()]
        self.ended |= {rank: [None, time.time()] for rank in self.running}
        for pid in asked:
            os.kill(pid, signal.SIGABRT)
        deadline = time.time() + WRITING_SECONDS
        # WNOWAIT: to be waited for below, like those that don't die of it.
        while time.time() < deadline and not all(
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in asked
        ):
            time.sleep(POLL_SECONDS)
        self._kill_running()

    def _kill_running(self) -> None:
        for pid in self.running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.running.clear()

    def _kill_all(self) -> None:
        """Kill the ranks and what they may have left behind: data loader workers, compilers."""
        self._kill_running()
        for pid in self.processes.values():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
