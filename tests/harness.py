"""Runs a function in N real processes that form a gloo group, and gives back what each rank returned.

A hang is a failure like any other: after ``timeout`` seconds, or ``GRACE`` seconds after the first rank failed, every
process is killed and each rank's output is in the message.

    results = launch("workers.warmup:faults", world_size=2, folder=tmp_path, some="argument")
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import compiled_ops
import torch

TESTS = Path(__file__).resolve().parent
BENCHMARKS = TESTS.parent / "launch" / "benchmarks"
TIMEOUT = 150
GRACE = 10


def launch(worker: str, world_size: int, folder: Path, timeout: float = TIMEOUT, **arguments: Any) -> list[Any]:
    """Call ``worker`` on ``world_size`` ranks.

    Args:
        worker: ``"module:function"``; called as ``function(folder, **arguments)``. One rank gets no process group.
        world_size: number of processes.
        folder: for the ranks' files; created.
        timeout: seconds until a hang is called a hang.
        **arguments: what JSON can hold.

    Returns:
        Each rank's result (tensors, numbers, strings, and lists, tuples and dicts of them).

    Raises:
        AssertionError: a rank failed or all hung; the message holds each rank's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiled_ops.remove_locks()
    (folder / "arguments.json").write_text(json.dumps(arguments))
    ranks = []
    try:
        for rank in range(world_size):
            with open(folder / f"output_{rank}.txt", "wb") as output:
                command = [sys.executable, __file__, worker, str(folder)]
                environment = rank_environment(rank, world_size)
                # A session of its own, so that killing it also takes what DeepSpeed starts (a compiler, say).
                ranks.append(
                    subprocess.Popen(
                        command, env=environment, cwd=folder, stdout=output, stderr=output, start_new_session=True
                    )
                )
        problem = _wait(ranks, timeout)
    finally:
        for process in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if problem:
        raise AssertionError(f"{worker} on {world_size} ranks: {problem}\n{_outputs(folder, world_size)}")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(world_size)]


def launch_engines(
    worker: str, launches: dict[int, list[str]], folder: Path, **arguments: Any
) -> dict[tuple[int, str], list[Any]]:
    """One launch for each world size, all its engines in the same processes.

    Args:
        worker: as for :func:`launch`; gets ``engines`` and returns engine -> findings.
        launches: world size -> engines.
        folder: for the ranks' files.
        **arguments: of the worker.

    Returns:
        (world size, engine) -> each rank's findings.
    """
    results = {}
    for world_size, engines in launches.items():
        ranks = launch(worker, world_size, folder / f"ranks{world_size}", engines=engines, **arguments)
        results |= {(world_size, engine): [rank[engine] for rank in ranks] for engine in engines}
    return results


def rank_environment(rank: int, world_size: int) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ACCELERATE_", "DS_", "PYTEST_", "MASTER_", "GROUP_")) and name not in _RANK_VARIABLES
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


_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS")


def _wait(ranks: list[subprocess.Popen], timeout: float) -> str | None:
    deadline = time.monotonic() + timeout
    failed_at = None
    while True:
        codes = [process.poll() for process in ranks]
        if all(code == 0 for code in codes):
            return None
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed and failed_at is None:
            failed_at = time.monotonic()
        if failed and (None not in codes or time.monotonic() > failed_at + GRACE):
            return f"rank {failed[0]} failed"
        if time.monotonic() > deadline:
            running = [rank for rank, code in enumerate(codes) if code is None]
            for rank in running:
                ranks[rank].send_signal(signal.SIGABRT)  # faulthandler writes where it hangs
            time.sleep(1)
            return f"no end after {timeout:g} s: ranks {running} hang"
        time.sleep(0.05)


def _outputs(folder: Path, world_size: int, lines: int = 60) -> str:
    def tail(rank: int) -> str:
        text = (folder / f"output_{rank}.txt").read_text(errors="replace").splitlines()
        return "\n".join([f"--- rank {rank} ---", *text[-lines:]])

    return "\n".join(tail(rank) for rank in range(world_size))


def _run_worker(worker: str, folder: Path) -> None:
    import faulthandler

    import torch.distributed as dist

    from smt_dist.fault_tolerance.process_end import let_threads_settle

    faulthandler.enable()
    torch.set_num_threads(1)
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size > 1:
        dist.init_process_group(
            "gloo",
            init_method=(folder / "rendezvous").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT),
        )
    module, _, function = worker.partition(":")
    arguments = json.loads((folder / "arguments.json").read_text())
    work = getattr(importlib.import_module(module), function)
    # Workers collect garbage after each run: without what the imports left, that takes no time.
    gc.freeze()
    result = work(folder, **arguments)
    torch.save(result, folder / f"result_{rank}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        let_threads_settle()


if __name__ == "__main__":
    _run_worker(sys.argv[1], Path(sys.argv[2]))
