"""The planner beside real runs of small models.

python launch/benchmarks/validate_memory.py --output validation.json      (or: profile_memory.py validate ...)

Every engine, method and dtype, with and without gradient checkpointing, on real gloo ranks; the error is of the
fullest rank's peak, as the CPU profiler saw the allocator. A run that is cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from memory_grid import Cell, Deviation, deviations, make_grid, summarize
from tqdm import tqdm

from smt_dist.cli.program import HelpFormatter, check_writable, configure_logging, raise_usage_error, run_program
from smt_dist.errors import SMTError
from smt_dist.files import parse_json_object, read_text
from smt_dist.memory.plan.categories import format_size
from smt_dist.memory.plan.plan import make_plan
from smt_dist.memory.plan.request import ENGINES

# Of one cell, and of what its ranks import and compile before the first.
CELL_SECONDS = 300
START_SECONDS = 900
Found = dict[str, dict[str, Any]]


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises SMTError, naming the flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--engines", nargs="+", help=f"of {', '.join(ENGINES)}; None: all")
    add("--methods", nargs="+", help="of smt, full, lora; None: all")
    add("--dtypes", nargs="+", help="of float32, bfloat16; None: both")
    add("--ranks", nargs="+", type=int, help="of 1, 2: real gloo processes; None: both")
    add("--small", action="store_true", help="about a twentieth of the weights, for a quick check")
    add("--output", type=Path, help="JSON file to write, cell by cell; cells that it holds already aren't run again")
    parser.error = raise_usage_error
    return parser.parse_args()


def choose_cells(arguments: argparse.Namespace) -> list[Cell]:
    """The grid's cells that the flags leave. Raises SMTError, naming the flag."""
    grid = cells = make_grid(arguments.small)
    for flag, attribute in (("engines", "engine"), ("methods", "method"), ("dtypes", "dtype"), ("ranks", "ranks")):
        wanted = getattr(arguments, flag)
        if wanted:
            known = sorted({getattr(cell, attribute) for cell in grid}, key=str)
            if unknown := [value for value in wanted if value not in known]:
                raise SMTError(f"--{flag}: {unknown[0]} is not one of {', '.join(map(str, known))}")
            cells = [cell for cell in cells if getattr(cell, attribute) in wanted]
    if not cells:
        raise SMTError("--engines, --methods, --dtypes, --ranks: no cell of the grid has all of these")
    return cells


def read_earlier(path: Path | None, cells: list[Cell]) -> Found:
    """What an earlier run of the same cells found. Raises SMTError if the file is another's."""
    if path is None or not path.exists():
        return {}
    found = parse_json_object(read_text(str(path)), f"--output: {path}").get("cells")
    if not isinstance(found, dict):
        raise SMTError(f"--output: {path} is no validation's; give another, or delete it")
    wanted = {cell.name: cell.to_json() for cell in cells}
    for name, result in found.items():
        if not isinstance(result, dict) or (name in wanted and result.get("cell") != wanted[name]):
            raise SMTError(f"--output: {path} was made with other settings; give another, or delete it")
    return {name: result for name, result in found.items() if "error" not in result}


def validate(cells: list[Cell], output: Path | None) -> Found:
    """Run what isn't there yet; each cell is written to ``output`` as it comes."""
    found = read_earlier(output, cells)
    missing = [cell for cell in cells if cell.name not in found]
    with tqdm(total=len(cells), initial=len(cells) - len(missing), desc="validating", unit="cell") as bar:
        for (engine, ranks, _), group in groupby(missing, key=_processes):
            bar.set_postfix_str(f"{engine}, {ranks} ranks")
            for cell, measured in _measure(list(group)):
                found[cell.name] = {"cell": cell.to_json(), **measured}
                if "measured" in measured:
                    plan = make_plan(cell.request())
                    found[cell.name]["planned"] = {name: phase.to_json()["peak"] for name, phase in plan.phases.items()}
                if output is not None:
                    write_report(output, found)
                bar.update()
    return {cell.name: found[cell.name] for cell in cells}


def _processes(cell: Cell) -> tuple[str, int, str]:
    """Equal for cells that may run in the same processes.

    DeepSpeed 0.19.8 keeps a ZeRO-3 model and its optimizer alive after ``destroy``: the next would count them too.
    """
    return cell.engine, cell.ranks, cell.name if cell.engine == "zero3" else ""


def write_report(output: Path, found: Found) -> None:
    """All cells, and what they come to."""
    report = {"summary": summarize(deviations(found)), "cells": found}
    temporary = output.with_name(output.name + ".part")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(output)


def _measure(cells: list[Cell]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell with ``measured``, or with ``error``: the others then go on in new processes."""
    while cells:
        done = 0
        with tempfile.TemporaryDirectory() as folder:
            process, log = _start(cells, Path(folder))
            try:
                for cell in cells:
                    seconds = CELL_SECONDS if done else START_SECONDS
                    result = _wait_for(process, Path(folder) / f"{done}.json", seconds)
                    if result is None:
                        break
                    done += 1
                    yield cell, {"measured": result}
            finally:
                _end(process, at_once=done < len(cells))
            if done < len(cells):
                yield cells[done], {"error": _last_error(log)}
                done += 1
        cells = cells[done:]


def _start(cells: list[Cell], folder: Path) -> tuple[subprocess.Popen, Path]:
    (folder / "cells.json").write_text(json.dumps([cell.to_json() for cell in cells]))
    log = folder / "log.txt"
    program = Path(__file__).with_name("memory_ranks.py")
    ranks = ["--standalone", "--nproc_per_node", str(cells[0].ranks)]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, str(program), str(folder / "cells.json")]
    with open(log, "wb") as output:
        return subprocess.Popen(command, stdout=output, stderr=output), log


def _end(process: subprocess.Popen, at_once: bool) -> None:
    """A rank that is killed while it loads DeepSpeed's ops leaves a lock, for which later ones wait without end."""
    if not at_once:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(CELL_SECONDS)
    process.terminate()  # torchrun ends its ranks
    process.wait()


def _wait_for(process: subprocess.Popen, path: Path, seconds: float) -> Any:
    """What the ranks wrote; None if they ended or took too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended = process.poll() is not None
        if path.exists():
            return json.loads(path.read_text())
        if ended:
            return None
        time.sleep(0.1)
    return None


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (errors or ["no result in time, or killed"])[0].strip()


def table(found: Found) -> str:
    """A line a phase of a cell, and what they come to."""
    all_of_them = list(deviations(found))
    lines = [f"{'cell':<44}{'phase':<10}{'planned':>12}{'measured':>12}{'error':>9}"]
    lines += [_line(deviation) for deviation in all_of_them]
    lines += [f"{name:<44}failed: {result['error']}" for name, result in found.items() if "error" in result]
    total = summarize(all_of_them)
    if total["phases"]:
        lines.append(
            f"{total['phases']} peaks: {total['hold']} within 5 % or 16 MiB, {total['within_relative']} within 5 %; "
            f"error in the median {total['median']:.2%}, at most {total['largest']:.2%}"
        )
    return "\n".join(lines)


def _line(deviation: Deviation) -> str:
    sizes = f"{format_size(deviation.planned):>12}{format_size(deviation.measured):>12}"
    mark = "" if deviation.holds else "  too far"
    return f"{deviation.cell:<44}{deviation.phase:<10}{sizes}{deviation.relative:>+9.2%}{mark}"


def main() -> None:
    """Run the grid; fails if a plan is too far off."""
    arguments = parse_arguments()
    configure_logging()
    if arguments.output is not None:
        check_writable("--output", arguments.output.absolute().parent)
    found = validate(choose_cells(arguments), arguments.output)
    print(table(found))
    if any("error" in result for result in found.values()) or not all(d.holds for d in deviations(found)):
        raise SMTError("validate: a cell failed, or its plan is too far off")


if __name__ == "__main__":
    run_program(main)
