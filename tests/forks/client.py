"""Start a prepared parent when it is first needed, and another when it has died."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from forks.environment import rank_environment
from forks.job import Job


class ForkServer:
    """Hold a prepared parent, which starts at its first job.

    Args:
        enter: what to put before a command that is to run where the ranks shall.
    """

    def __init__(self, enter: Sequence[str] = ()) -> None:
        self.enter = list(enter)
        self.process: subprocess.Popen | None = None
        self._ready = False
        self._failure: AssertionError | None = None

    def start(self) -> None:
        """Have it ready for jobs; one that couldn't start isn't tried again by every test that follows."""
        if self._failure is not None:
            raise self._failure
        self.begin()
        if not self._ready:
            try:
                self._answer("ready\n")
            except AssertionError as error:
                self._failure = error
                raise
            self._ready = True

    def begin(self) -> None:
        """Start it, unless it runs, without waiting until it is ready."""
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        self._ready = False
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the parent)
        # A session of its own: an interrupt from the keyboard is for the tests, which then close its pipe.
        self.process = subprocess.Popen(
            [*self.enter, sys.executable, "-m", "forks.server"],
            # Without it Arrow's allocator starts a thread, which forks would not have.
            env=rank_environment(0, 1) | {"JE_ARROW_MALLOC_CONF": "background_thread:false"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )

    def submit(self, job: Job) -> None:
        """Give it a job; :meth:`result` has to be called before the next one."""
        self.start()
        self.process.stdin.write(json.dumps(job.to_json()) + "\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, dict[int, Any]]:
        """Wait for what came of the job: see :meth:`forks.waiting.Watch.wait`."""
        found = json.loads(self._answer())
        return {name: {int(rank): value for rank, value in by_rank.items()} for name, by_rank in found.items()}

    def close(self) -> None:
        """End it, with the ranks of an unfinished job."""
        if self.process is not None:
            self.process.communicate()  # closes its stdin and waits
            self._log.close()
            self.process = None

    def _answer(self, expected: str = "") -> str:
        """Read its next line; one that doesn't begin as expected, or none, is its end."""
        try:
            said = self.process.stdout.readline()
        except BaseException:  # a test that is over, by its time limit or the keyboard
            self.close()
            raise
        if not said.startswith(expected) or not said:
            self._log.seek(0)
            log = self._log.read().decode(errors="replace")
            self.close()
            raise AssertionError(f"the parent of the ranks is gone: {said}{log[-4000:]}")
        return said
