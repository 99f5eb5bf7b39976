"""Runs the missing cells one after another, each in a process of its own, until all are there or time is up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparison.cells import Cell
from comparison.plan import Plan, check_batches, mean_seconds

BENCHMARKS = Path(__file__).resolve().parents[1]  # where a cell's process finds this package
TERMINATION_SECONDS = 30  # for a cell to end by itself when the program is interrupted


@dataclass(frozen=True)
class Limits:
    """When to stop early; None: when all is there.

    Attributes:
        cells: to run at most.
        hours: after which no cell is started, nor one that isn't expected to be done by then.
        keep_artefacts: don't delete what was trained once it is tested.
    """

    cells: int | None = None
    hours: float | None = None
    keep_artefacts: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a launch did.

    Attributes:
        run: cells that it ran.
        failed: (label, last line of the log) of those that failed.
        stopped: why it ended although cells are missing; None if it didn't.
    """

    run: int
    failed: list[tuple[str, str]]
    stopped: str | None


def run_missing(plan: Plan, limits: Limits, say: Callable[[str], None]) -> Outcome:
    """Run what is missing, cheapest knowledge first (see :meth:`Plan.missing`); a failed cell costs that cell only.

    Args:
        plan: the grid.
        limits: when to stop.
        say: gets a line when a cell begins and one when it ends.

    Raises:
        SMTError: another launch runs in this folder.
        RuntimeError: two methods saw different batches.
    """
    begin, done, failed = time.monotonic(), 0, []
    with plan.store.locked(), _termination_as_interrupt():
        plan.store.forget_failures()
        while (cell := next(plan.missing(), None)) is not None:
            if (reason := _must_stop(plan, cell, limits, done, time.monotonic() - begin)) is not None:
                return Outcome(done, failed, reason)
            start = time.monotonic()
            say(f"{cell.label} begins; its log: {plan.store.log(cell)}")
            problem = run_cell(plan, cell)
            done += 1
            if problem is not None:
                failed.append((cell.label, problem))
            elif not limits.keep_artefacts:
                plan.store.prune(plan.needed_artefacts())
            check_batches(plan)
            say(f"{_position(plan)} {cell.label}: {_said(plan, cell, problem)}, {_span(time.monotonic() - start)}")
    return Outcome(done, failed, None)


def run_cell(plan: Plan, cell: Cell) -> str | None:
    """Run one cell and keep its figures. Returns the last line of its log where it failed, and keeps the log."""
    store = plan.store
    with tempfile.TemporaryDirectory() as folder:
        request, figures = Path(folder, "request.json"), Path(folder, "figures.json")
        request.write_text(json.dumps({"kind": cell.kind, "request": cell.request, "paths": cell.paths}))
        command = [sys.executable, "-m", "comparison.cell_run", str(request), str(figures)]
        start = time.monotonic()
        try:
            with open(store.log(cell), "w") as log:
                code = _run(command, log)
        except KeyboardInterrupt:
            store.log(cell).unlink()
            raise
        if code == 0 and figures.is_file():
            store.write(cell, {**json.loads(figures.read_text()), "seconds": time.monotonic() - start})
            store.log(cell).unlink()
            return None
    if code < 0:  # killed, by the kernel for want of memory perhaps: it couldn't say anything
        with open(store.log(cell), "a") as log:
            log.write(f"\nended by {signal.Signals(-code).name}\n")
    os.replace(store.log(cell), store.failed_mark(cell))
    return store.failure(cell)


def _run(command: list[str], log: Any) -> int:
    # One device for all methods: Trainer would spread a model over several, SMT's wouldn't.
    environment = {"CUDA_VISIBLE_DEVICES": "0", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    with subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            return process.wait()
        except BaseException:  # this program is told to end: so is the cell
            process.terminate()
            try:
                process.wait(TERMINATION_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


@contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the running cell too, as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _must_stop(plan: Plan, cell: Cell, limits: Limits, done: int, seconds: float) -> str | None:
    if limits.cells is not None and done >= limits.cells:
        return f"--max_cells {limits.cells}"
    if limits.hours is None:
        return None
    means = mean_seconds(plan)
    expected = means.get((cell.kind, cell.method), means.get((cell.kind, ""), 0.0))
    return f"--hours {limits.hours:g}" if seconds + expected > 3600 * limits.hours else None


def _position(plan: Plan) -> str:
    total = sum(plan.count().values())
    failed = sum(plan.store.failure(cell) is not None for cell in plan.known())
    seconds = remaining_seconds(plan)
    return f"[{len(plan.finished()) + failed}/{total}, about {_span(seconds)} to go]"


def remaining_seconds(plan: Plan) -> float:
    """What the missing cells take if they are like the finished ones of their kind."""
    means, finished = mean_seconds(plan), plan.finished()
    seconds = 0.0
    for kind, count in plan.count().items():
        left = count - sum(cell.kind == kind for cell, _ in finished)
        seconds += left * means.get((kind, ""), means.get(("train", ""), 0.0))
    return seconds


def _said(plan: Plan, cell: Cell, problem: str | None) -> str:
    figures = plan.store.result(cell)
    if figures is None:
        return f"failed ({problem})"
    if cell.kind == "test":
        return f"accuracy {figures['accuracy']:.3f}, test loss {figures['test_loss']:.4f}"
    loss = figures["validation_loss"]
    return "diverged" if loss is None else f"validation loss {loss:.4f}"


def _span(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def list_cells(plan: Plan) -> str:
    """The cells and what each costs, by the finished ones; for ``--list``."""
    means = mean_seconds(plan)
    lines = []
    for cell in plan.known():
        figures, failure = plan.store.result(cell), plan.store.failure(cell)
        expected = means.get((cell.kind, cell.method), means.get((cell.kind, "")))
        cost = "unknown: none is finished" if expected is None else f"about {_span(expected)}"
        state = f"done in {_span(figures['seconds'])}" if figures else f"failed: {failure}" if failure else cost
        lines.append(f"{cell.key}  {cell.label}: {state}")
    counts = plan.count()
    total = sum(counts.values())
    waiting = total - len(lines)
    if waiting > 0:
        lines.append(f"and {waiting} cells that wait for their learning rate")
    shown = _span(remaining_seconds(plan)) if means else "unknown"
    lines.append(
        f"{total} cells ({counts['train']} train, {counts['test']} test), {len(plan.finished())} done; to go: {shown}"
    )
    return "\n".join(lines)
