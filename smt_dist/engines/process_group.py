"""Create the process group, and warn of what could block it."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from torch.utils.cpp_extension import get_default_build_root

from smt_dist.distributed import get_rank

logger = logging.getLogger(__name__)


def initialize_process_group(engine: str, timeout: float, begin: Callable[[], object]) -> None:
    """Set up the process group, and DeepSpeed's own part on top, before any model is built.

    Args:
        engine: one of :data:`smt_dist.engines.ENGINES`.
        timeout: seconds of waiting in one of DeepSpeed's collectives.
        begin: makes the group: ``TrainingArguments`` does as it looks for its device.
    """
    if engine == "deepspeed" and "RANK" not in os.environ:
        os.environ |= _single_rank()  # without a launcher DeepSpeed would ask MPI
    begin()
    if get_rank() == 0:
        warn_of_a_shared_store()
    if engine == "deepspeed":
        # Imported here: DeepSpeed takes seconds, and ddp doesn't need it.
        import deepspeed

        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            warn_of_abandoned_builds()
        # Before from_pretrained: otherwise zero.Init would calculate with one rank.
        deepspeed.init_distributed(timeout=timedelta(seconds=timeout))


def warn_of_a_shared_store() -> None:
    """Log how torchrun restarts ranks safely, where it will restart them.

    In torch 2.13.0 its agent keeps one store for all tries: restarted ranks may read the addresses of those that are
    gone, and then wait for one another until the time-out.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        logger.warning(
            "torchrun --max-restarts %d: restarted ranks may read addresses of those that are gone, and hang. Launch "
            "with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv_backend c10d (or --standalone)",
            restarts,
        )


def warn_of_abandoned_builds(minutes: float = 5) -> None:
    """Warn of locks that killed builds left: PyTorch waits for them for ever, silently.

    Args:
        minutes: from which age on; a build of one of DeepSpeed's ops takes less.
    """
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in [*root.glob("*/lock"), *root.glob("*/*/lock")]:
        if _age(lock) > 60 * minutes:
            logger.warning(
                "%s is over %g minutes old: if no process compiles DeepSpeed's ops now, one was killed while it did, "
                "and this run may wait for it without end; then delete that file",
                lock,
                minutes,
            )


def _age(path: Path) -> float:
    """Return a lock's age in seconds; 0 if another node's build removed it meanwhile."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _single_rank() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
