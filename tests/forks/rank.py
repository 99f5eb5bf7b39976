"""Be one rank of a job, in a forked process that is an ordinary one otherwise."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import gc
import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from programs import LAUNCH, load_program

from forks.faults import watch_activities
from forks.job import OUTPUT, TIMEOUT, Job
from smt_dist.cli.program import run_program
from smt_dist.fault_tolerance.process_end import let_threads_settle

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def become(job: Job, rank: int, parent: int) -> NoReturn:
    """Be one rank of the job: with its own output, session, environment and working directory."""
    os.setsid()  # so that killing its group also takes what DeepSpeed starts (a compiler, say)
    _end_with(parent)
    _redirect(job, rank)
    os.environ.clear()
    os.environ.update(job.environments[rank])
    os.chdir(job.folder)
    faulthandler.enable()
    # Python seeds its own generator anew in each fork, but NumPy's would be the same in all ranks.
    np.random.seed()
    _end(_code_of(lambda: _train(job, rank) if job.worker is None else _work(job, rank)))


def _end_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent is killed: nobody else would."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _redirect(job: Job, rank: int) -> None:
    output = os.open(job.folder / OUTPUT.format(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for own, stream in ((null, 0), (output, 1), (output, 2)):
        os.dup2(own, stream)


def _train(job: Job, rank: int) -> None:
    """Run launch/train.py."""
    signal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))  # the main thread hangs, the others don't
    watch_activities(job.folder, rank, job.faults.get(rank))
    sys.argv = [str(LAUNCH / "train.py"), *job.flags]
    run_program(load_program("train.py").main)


def _work(job: Job, rank: int) -> None:
    """Call the worker in a gloo group, and leave what it returns for the caller."""
    if job.world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=(job.folder / "rendezvous").as_uri(),
            rank=rank,
            world_size=job.world_size,
            timeout=timedelta(seconds=TIMEOUT),
        )
    module, _, function = job.worker.partition(":")
    work = getattr(importlib.import_module(module), function)
    # Workers collect garbage after each run: without what the imports left, that takes no time.
    gc.freeze()
    result = work(job.folder, **job.arguments)
    torch.save(result, job.folder / f"result_{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        let_threads_settle()


def _code_of(work: Callable[[], None]) -> int:
    """Return the exit code that Python would end with."""
    try:
        work()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
            return 1
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _end(code: int) -> NoReturn:
    """End as Python does, but for freeing memory.

    For that a fork must first copy what it shares, which takes half of a job's time.
    """
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
