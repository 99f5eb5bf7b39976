"""A prepared parent that has imported everything, and forks the ranks of one job after the other.

A job then costs its own seconds, not those of the imports. Jobs come as JSON lines on stdin; for each, one line of
results goes to stdout. A forked rank is an ordinary process otherwise: runs launch/train.py, and ends as Python ends.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.01
STARTED = 300.0  # seconds for a run that nobody hurts, on a busy machine
PHASES, FAULT, OUTPUT = "phases_{}.jsonl", "fault_{}.json", "output_{}.txt"


def serve() -> Any:
    """Run jobs until stdin closes. In a forked rank: return what it has to do."""
    # Results have the pipe for themselves: libraries log to stdout too.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _prepare()
    print("ready", file=results)
    for line in sys.stdin:
        job = json.loads(line)
        processes = {}
        for rank, told in job["ranks"].items():
            pid = os.fork()
            if pid == 0:
                os.close(results.fileno())
                return lambda job=job, rank=int(rank), told=told: _rank(job, rank, told)
            processes[int(rank)] = pid
        print(json.dumps(_wait(processes, Path(job["folder"]), job["world_size"], job["limit"])), file=results)
    return None


def _prepare() -> None:
    # Whatever a rank would import, so that forks share it. None of it may start a thread or a process group.
    import datasets  # noqa: F401
    import deepspeed.runtime.engine  # noqa: F401
    import torch._dynamo
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401
    from compiled_ops import BUILD
    from programs import load_program

    import smt_dist.engines.ddp
    import smt_dist.engines.deepspeed
    import smt_dist.engines.fsdp2
    import smt_dist.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    load_program("train.py")
    exec(BUILD)  # loaded once, not in each fork: its own check of what is compiled takes seconds
    # A collection in a fork would copy all memory that it shares.
    gc.collect()
    gc.freeze()


def _rank(job: dict[str, Any], rank: int, told: dict[str, Any]) -> None:
    """Be one rank of the job."""
    folder = Path(job["folder"])
    output = os.open(folder / OUTPUT.format(rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    null = os.open(os.devnull, os.O_RDONLY)
    for own, stream in ((null, 0), (output, 1), (output, 2)):
        os.dup2(own, stream)
    os.setpgid(0, 0)
    os.environ.update(told["environment"])
    faulthandler.enable()
    signal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))  # the main thread hangs, the others don't
    _watch_phases(folder, rank, told.get("fault"))
    sys.argv = ["train.py", *job["flags"]]

    from programs import load_program

    from smt_dist.cli.program import run_program

    # Python's own end but for freeing memory, for which a fork must first copy what it shares: half of a job's time.
    try:
        run_program(load_program("train.py").main)
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


def _watch_phases(folder: Path, rank: int, fault: dict[str, Any] | None) -> None:
    """Write down each phase as it begins, and hurt this process in the one that the fault names.

    A fault: ``signal``; ``phase``, by how its name begins; ``delay`` in seconds from there; ``pause``, after which it
    is continued (by the parent).
    """
    from smt_dist.fault_tolerance.activity import current_phase, on_phase

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


def _wait(processes: dict[int, int], folder: Path, world_size: int, limit: float) -> dict[str, Any]:
    """Wait for all ranks, but no longer than ``limit`` seconds after a fault, and STARTED without one.

    Returns:
        Rank -> exit code (minus the signal's number where it died of one) and time of its end; ranks that hang or are
        stopped are killed and have the code None.
    """
    deadline, running = time.time() + STARTED, dict(processes)
    ended: dict[int, list[Any]] = {}
    faults: dict[int, dict[str, Any]] = {}
    while running:
        for rank, pid in list(running.items()):
            gone, status = os.waitpid(pid, os.WNOHANG)
            if gone:
                del running[rank]
                ended[rank] = [os.waitstatus_to_exitcode(status), time.time()]
        for rank in range(world_size):  # also those on the other node: it is one machine, with one disk
            path = folder / FAULT.format(rank)
            if rank not in faults and path.exists() and (text := path.read_text()):
                faults[rank] = json.loads(text)
                deadline = max(fault["time"] for fault in faults.values()) + limit
            fault = faults.get(rank)
            if fault and fault.get("pause") and time.time() > fault["time"] + fault["pause"] and rank in running:
                os.kill(running[rank], signal.SIGCONT)
        stopped = {rank for rank in running if rank in faults and faults[rank]["signal"] == signal.SIGSTOP}
        stopped -= {rank for rank in stopped if faults[rank].get("pause")}
        others_ended = len(processes) == world_size and running and set(running) == stopped
        if time.time() > deadline or others_ended:
            _end(running, ended, stopped)
        time.sleep(POLL_SECONDS)
    _end_groups(processes)
    return {"ended": ended, "faults": faults}


def _end(running: dict[int, int], ended: dict[int, list[Any]], stopped: set[int]) -> None:
    """Kill what still runs; faulthandler writes first where a hanging rank hangs."""
    for rank, pid in running.items():
        ended[rank] = [None, time.time()]
        if rank not in stopped:
            os.kill(pid, signal.SIGABRT)
    time.sleep(0.5)
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    running.clear()


def _end_groups(processes: dict[int, int]) -> None:
    """What a rank may have left behind: data loader workers, compilers."""
    for pid in processes.values():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    work = serve()
    if work is not None:
        work()
