"""Do what the tests of the prepared parent ask for."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from smt_dist.distributed import get_rank

seen: list[str] = []  # the module's state, which a launch changes


def describe(_folder: Path, mark: str = "") -> dict[str, Any]:
    """Describe what this rank finds around it."""
    seen.append(mark)
    return {
        "seen": list(seen),
        "environment": dict(os.environ),
        "place": str(Path.cwd()),
        "session": os.getsid(0),
        "process": os.getpid(),
        "drawn": int(np.random.randint(2**31)),
    }


def fail(_folder: Path) -> None:
    """Fail on rank 1, and wait for an hour on others."""
    print(f"rank {get_rank()} has begun")
    if get_rank() == 1:
        raise RuntimeError("on purpose")
    time.sleep(3600)


def hang(folder: Path) -> None:
    """Hang on rank 1, with a child that hangs too."""
    if get_rank() == 1:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
        (folder / "child").write_text(str(child.pid))
        time.sleep(3600)


def wait(folder: Path) -> None:
    """Say who this is, and wait for an hour."""
    (folder / "process").write_text(str(os.getpid()))
    time.sleep(3600)
