"""Hurt a rank of launch/train.py in the phase that was asked for."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from forks.job import FAULT, PHASES
from smt_dist.fault_tolerance.activity import current_phase, on_phase


def watch_phases(folder: Path, rank: int, fault: dict[str, Any] | None) -> None:
    """Write down each phase as it begins, and hurt this process in the one that the fault names.

    A fault: ``signal``; ``phase``, by how its name begins; ``delay`` in seconds from there; ``pause``, after which it
    is continued (by the parent).
    """
    log = os.open(folder / PHASES.format(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    armed = [fault is not None]

    def hurt() -> None:
        record = {"time": time.time(), "phase": current_phase(), **fault}
        (folder / FAULT.format(rank)).write_text(json.dumps(record))
        os.kill(os.getpid(), fault["signal"])

    def listen(phase: str) -> None:
        os.write(log, json.dumps([time.time(), phase]).encode() + b"\n")
        if armed[0] and phase.startswith(fault["phase"]):
            armed[0] = False
            timer = threading.Timer(fault["delay"], hurt)
            timer.daemon = True
            timer.start()

    on_phase(listen)
