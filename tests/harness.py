"""Run a function in N real processes, and give back what each rank returned.

The processes form a gloo group. They are forked from a prepared parent (see :mod:`forks.server`), new ones for each
launch: nothing that one launch leaves behind is seen by the next. Unlike ranks that a launcher starts, they agree on
the order of sets of strings. A hang is a failure like any other: after ``timeout`` seconds, or ``GRACE`` seconds after
the first rank failed, every process is killed and each rank's output is in the message.

    results = launch("workers.warmup:faults", world_size=2, folder=tmp_path, some="argument")
"""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any, TypeVar

import compiled_ops
import torch
from forks.client import ForkServer
from forks.environment import BENCHMARKS, TESTS, rank_environment
from forks.job import OUTPUT, TIMEOUT, Job

__all__ = [
    "BENCHMARKS",
    "GRACE",
    "TESTS",
    "TIMEOUT",
    "launch",
    "launch_engines",
    "launch_runs",
    "rank_environment",
    "this_server",
]

GRACE = 10
Run = TypeVar("Run")
this_server = ForkServer()  # on this machine, for all tests of a session
atexit.register(this_server.close)


def launch(worker: str, world_size: int, folder: Path, timeout: float = TIMEOUT, **arguments: Any) -> list[Any]:
    """Call ``worker`` on ``world_size`` ranks.

    Args:
        worker: ``"module:function"``; called as ``function(folder, **arguments)``. One rank gets no process group.
        world_size: number of processes.
        folder: for the ranks' files; created; their working directory.
        timeout: seconds until a hang is called a hang.
        **arguments: what JSON can hold.

    Returns:
        Each rank's result (tensors, numbers, strings, and lists, tuples and dicts of them).

    Raises:
        AssertionError: a rank failed or all hung; the message holds each rank's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    compiled_ops.remove_locks()
    environments = {rank: rank_environment(rank, world_size) for rank in range(world_size)}
    this_server.submit(
        Job(folder, world_size, environments, worker=worker, arguments=arguments, timeout=timeout, grace=GRACE)
    )
    ended = this_server.result()["ended"]
    if problem := _problem({rank: code for rank, (code, _) in ended.items()}, timeout):
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


def launch_runs(
    worker: str, runs: dict[Run, tuple[int, dict[str, Any]]], folder: Path, **arguments: Any
) -> dict[Run, list[Any]]:
    """One launch for each world size, all its runs in the same processes.

    Args:
        worker: as for :func:`launch`; gets ``runs``, a list of keywords, and returns as many findings.
        runs: each with its world size and the keywords that the worker gets.
        folder: for the ranks' files.
        **arguments: of the worker, and ``timeout``.

    Returns:
        Run -> each rank's findings.
    """
    results = {}
    for world_size in sorted({size for size, _ in runs.values()}):
        own = {run: keywords for run, (size, keywords) in runs.items() if size == world_size}
        ranks = launch(worker, world_size, folder / f"ranks{world_size}", runs=list(own.values()), **arguments)
        results |= {run: [rank[index] for rank in ranks] for index, run in enumerate(own)}
    return results


def _problem(codes: dict[int, int | None], timeout: float) -> str | None:
    """What is wrong with the ranks' exit codes; a rank without one was killed."""
    if failed := sorted(rank for rank, code in codes.items() if code):
        return f"rank {failed[0]} failed"
    hanging = sorted(rank for rank, code in codes.items() if code is None)
    return f"no end after {timeout:g} s: ranks {hanging} hang" if hanging else None


def _outputs(folder: Path, world_size: int, lines: int = 60) -> str:
    def tail(rank: int) -> str:
        text = (folder / OUTPUT.format(rank)).read_text(errors="replace").splitlines()
        return "\n".join([f"--- rank {rank} ---", *text[-lines:]])

    return "\n".join(tail(rank) for rank in range(world_size))
