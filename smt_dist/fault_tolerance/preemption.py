"""Save and end a run on SIGTERM or SIGUSR1.

All ranks agree on the step after which they do.

transformers' ``enable_jit_checkpoint`` saves on the rank that got the signal, at the point where that rank happens to
be: ranks that get it a step apart, or not at all, save different steps, or wait for one another.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from smt_dist.fault_tolerance.activity import current_activity

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """Report that the run was asked to end before there was anything to save.

    Exit code: 128 + the signal's number, as in shells.

    ``text`` says so in words.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.text = (
            f"was asked to end ({signal.Signals(number).name}) in: {current_activity()}; there is nothing to save"
        )


class Preemption:
    """Catch the signals as long as this object lives.

    Before training a signal raises :class:`Preempted` at once. From :meth:`defer` on it only makes :attr:`requested`
    true, which the trainer looks at in each step.
    """

    def __init__(self) -> None:
        self._number = 0
        self._deferring = False
        self._before: dict[int, Any] = {number: signal.signal(number, self._handle) for number in SIGNALS}

    @property
    def requested(self) -> int:
        """Return the number of the signal that this rank got; 0 for none."""
        return self._number

    def defer(self) -> None:
        """Defer to the trainer: there is something to save, and it reads :attr:`requested`."""
        self._deferring = True

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        if self._number:
            return  # once is enough: launchers send it to the group and to each process
        self._number = number
        if not self._deferring:
            raise Preempted(number)
        # Not sys.stderr: the signal may have come while the main thread writes to it.
        name = signal.Signals(number).name
        os.write(2, f"smt_dist: {name} received: this step is finished and saved, then the run ends\n".encode())
