"""Make the environment of a rank that the tests start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
BENCHMARKS = TESTS.parent / "launch" / "benchmarks"
_LAUNCHERS = ("ACCELERATE_", "DS_", "PYTEST_", "MASTER_", "GROUP_")
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    """Return this process's environment for a rank, less what launchers and pytest set."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_LAUNCHERS) and name not in _RANK_VARIABLES
    }
    own = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]).strip(
            os.pathsep
        ),
        # DeepSpeed looks for ninja on the path when it loads its compiled collective.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
    }
    if world_size > 1:
        # The group itself meets in a file; address and port are only there because libraries ask for them.
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        own |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return inherited | own
