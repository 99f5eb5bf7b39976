"""Supervise a program's run: heartbeats between ranks, and signals that ask it to end."""

from __future__ import annotations

import os
import sys
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from smt_dist.errors import SMTError, first_line
from smt_dist.fault_tolerance.heartbeat import FAILED_GRACE, Heartbeat, start_heartbeat
from smt_dist.fault_tolerance.preemption import Preempted, Preemption

if TYPE_CHECKING:
    from torch import nn

# Seconds in which the heartbeat finds out whether another rank's end explains an exception.
EXPLANATION_SECONDS = 3.0


class _Supervision:
    heartbeat: Heartbeat | None = None
    preemption: Preemption | None = None


_active = _Supervision()


def supervise(heartbeat_timeout: float) -> None:
    """Begin supervision, once the process group exists; collective.

    :func:`smt_dist.cli.program.run_program` ends it.

    Args:
        heartbeat_timeout: seconds of silence after which a rank counts as lost; 0: no heartbeat.
    """
    if threading.current_thread() is threading.main_thread():  # others can't catch signals
        _active.preemption = Preemption()
    _active.heartbeat = start_heartbeat(heartbeat_timeout)


def honour_collective_timeout(model: nn.Module, seconds: float, optimizer: Any = None) -> None:
    """Set ``--ddp_timeout`` on all existing process groups.

    Libraries create theirs with PyTorch's default.

    Args:
        model: whose shards name the groups of FSDP2 and ZeRO-3.
        seconds: of waiting in one collective.
        optimizer: of the engine: ZeRO's has a group too.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    from smt_dist.engines.base import unwrapped

    if not (dist.is_available() and dist.is_initialized()):
        return
    groups = [dist.group.WORLD, getattr(unwrapped(optimizer), "dp_process_group", None)]
    for parameter in model.parameters():
        groups.append(getattr(parameter, "ds_process_group", None))
        if isinstance(parameter, DTensor):
            groups += parameter.device_mesh.get_all_groups()
    for group in {id(group): group for group in groups if group is not None}.values():
        group.set_timeout(timedelta(seconds=seconds))


def preemption() -> Preemption | None:
    """Return the object that catches the signals, if there is one."""
    return _active.preemption


def await_explanation() -> None:
    """Wait until it is clear that no other rank's end caused this rank's error.

    If one did, the process ends here with that explanation.
    """
    if _active.heartbeat is not None:
        _active.heartbeat.await_verdict(EXPLANATION_SECONDS)


def end_supervision(error: BaseException | None = None) -> None:
    """End supervision.

    After an ``error`` the other ranks are notified, unless one of them caused it, which ends the process.
    """
    heartbeat, _active.heartbeat = _active.heartbeat, None
    caught, _active.preemption = _active.preemption, None
    if heartbeat is not None:
        if error is None:
            heartbeat.stop()
        elif isinstance(error, Preempted):
            heartbeat.leave(error.text, int(error.code), grace=0.0)
        elif isinstance(error, SMTError):  # the other ranks have it too, or it is a RankError of this rank alone
            heartbeat.leave(f"failed: {error}", code=2)
        else:
            # Now: if another rank is the cause, this process ends without a traceback.
            rank = os.environ.get("RANK", "0")
            print(f"smt_dist: rank {rank}: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)
            heartbeat.await_verdict(EXPLANATION_SECONDS)
            heartbeat.leave(f"failed: {type(error).__name__}: {first_line(error)}", grace=FAILED_GRACE)
    if caught is not None:
        caught.restore()
