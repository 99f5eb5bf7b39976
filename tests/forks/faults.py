"""Hurt a rank of launch/train.py in the activity that was asked for."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from forks.job import ACTIVITIES, FAULT
from smt_dist.fault_tolerance.activity import current_activity, on_activity


def watch_activities(folder: Path, rank: int, fault: dict[str, Any] | None) -> None:
    """Write down each activity as it begins, and hurt this process in the one that the fault names.

    A fault: ``signal``; ``activity``, by how its name begins; ``delay`` in seconds from there; ``pause``, after which
    it is continued (by the parent).
    """
    log = os.open(folder / ACTIVITIES.format(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    armed = [fault is not None]

    def hurt() -> None:
        record = {"time": time.time(), "activity": current_activity(), **fault}
        (folder / FAULT.format(rank)).write_text(json.dumps(record))
        os.kill(os.getpid(), fault["signal"])

    def listen(activity: str) -> None:
        os.write(log, json.dumps([time.time(), activity]).encode() + b"\n")
        if armed[0] and activity.startswith(fault["activity"]):
            armed[0] = False
            timer = threading.Timer(fault["delay"], hurt)
            timer.daemon = True
            timer.start()

    on_activity(listen)
