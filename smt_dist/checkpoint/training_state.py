"""Save and load optimizer moments, schedule and random states beside an adapter.

Keyed by module, free of engine and world size (random states are kept per rank), and never pickled:
safetensors and JSON.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from smt_dist.checkpoint.adapter import BLOCKS_FILE
from smt_dist.engines.base import BlockState, Moments
from smt_dist.errors import SMTError, first_line
from smt_dist.files import (
    check_tensors,
    parse_json_object,
    read_header,
    read_tensors,
    read_text,
    shorten,
    write_tensors,
)

OPTIMIZER_FILE = "smt_optimizer.safetensors"
SCHEDULE_FILE = "smt_schedule.json"
GLOBAL_BATCH = "global_batch_size"
MULTIPLIERS = "smt_lr_multipliers"
MAX_COUNTER = 2**53  # beyond it a float doesn't count
NUMPY_STATE = 624  # words of a Mersenne Twister


def save_moments(folder: Path, shapes: Mapping[str, tuple[int, ...]], moments: Moments) -> None:
    """Write the optimizer's state tensor by tensor, named ``<module>:<moment>``.

    Its counters go into the metadata.

    Args:
        folder: of the checkpoint.
        shapes: module -> shape of its block tensor, in the order of ``moments.tensors``.
        moments: what the engine reads.
    """
    names = {f"{module}:{key}": shape for module, shape in shapes.items() for key in moments.names}
    # Taken out, so that none is kept while the next module's are read.
    tensors = ((f"{module}:{key}", found.pop(key)) for module, found in moments.tensors for key in moments.names)
    # One key only: safetensors' own writer orders several at random, and equal states should be equal files.
    metadata = {"counters": json.dumps(moments.counters, sort_keys=True)}
    write_tensors(folder / OPTIMIZER_FILE, names, tensors, metadata)


def load_states(
    folder: Path, deltas: Mapping[str, torch.Tensor], kept: tuple[list[str], list[str]] | None = None
) -> tuple[Iterator[BlockState], dict[str, int | float]]:
    """Load the saved state of each module of ``deltas``, and the optimizer's counters.

    Tensors are views of the mapped file: what is copied out of them is all that is read.

    Args:
        folder: the checkpoint.
        deltas: module -> master.
        kept: the moments and the counters that the optimizer keeps (:func:`smt_dist.engines.elementwise.state_names`);
            None where that isn't known.

    Raises:
        SMTError: the file is missing or damaged, a moment of a module is missing or of another shape, or the file was
            saved by an optimizer that keeps something else.
    """
    path = folder / OPTIMIZER_FILE
    found, metadata = read_header(path)
    keys = sorted({name.rpartition(":")[2] for name in found})
    wanted = {f"{name}:{key}": tuple(delta.shape) for name, delta in deltas.items() for key in keys}
    check_tensors(path, found, wanted, f"the blocks of {BLOCKS_FILE}")
    if "counters" not in metadata:
        raise SMTError(f"{path}: has no counters: it was written by another version of smt_dist")
    counters = parse_json_object(metadata["counters"], f"{path}: counters")
    if not all(type(value) in (int, float) and 0 <= value <= MAX_COUNTER for value in counters.values()):
        raise SMTError(f"{path}: counters are {shorten(str(counters))}, not numbers from 0 to {MAX_COUNTER}")
    # Before the first applied step there is no state to restore.
    if kept is not None and (keys or counters) and kept != (keys, sorted(counters)):
        saved, given = ", ".join(keys + sorted(counters)), ", ".join(kept[0] + kept[1])
        raise SMTError(
            f"{path}: holds {saved or 'nothing'}, but --optim keeps {given or 'nothing'}; give the optimizer that it "
            "was saved with"
        )
    tensors, _ = read_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SMTError(f"{path}: {name} is not finite (NaN or infinity)")
    states = (
        BlockState(name, delta, {key: tensors[f"{name}:{key}"] for key in keys}) for name, delta in deltas.items()
    )
    return states, counters


def save_schedule(folder: Path, schedule: dict[str, Any], global_batch: int, multipliers: list[float]) -> None:
    """Write the learning-rate schedule's state. JSON keeps every bit of a float.

    Args:
        folder: of the checkpoint.
        schedule: its ``state_dict()``.
        global_batch: rows of a step.
        multipliers: of the parameter groups' learning rates.
    """
    content = {**schedule, GLOBAL_BATCH: global_batch, MULTIPLIERS: multipliers}
    (folder / SCHEDULE_FILE).write_text(json.dumps(content))


def load_schedule(folder: Path, multipliers: list[float]) -> dict[str, Any]:
    """Read the schedule's state, for parameter groups of these learning-rate multipliers.

    A re-selection may leave a group without blocks, or give one its first: rates go by multiplier, not by place.

    Raises:
        SMTError: it is missing or malformed.
    """
    path = folder / SCHEDULE_FILE
    schedule = parse_json_object(read_text(path), str(path))
    rates = schedule.get("_last_lr")
    saved = schedule.pop(MULTIPLIERS, multipliers)
    if not isinstance(saved, list) or not saved or not all(_is_rate(value) and value > 0 for value in saved):
        raise SMTError(f"{path}: {MULTIPLIERS} is {shorten(repr(saved))}, not a list of multipliers")
    if not isinstance(rates, list) or not all(_is_rate(rate) for rate in rates) or len(rates) != len(saved):
        raise SMTError(f"{path}: has no learning rates (_last_lr) of {len(saved)} parameter groups")
    if type(schedule.get(GLOBAL_BATCH, 1)) is not int:
        raise SMTError(f"{path}: {GLOBAL_BATCH} is {shorten(repr(schedule[GLOBAL_BATCH]))}, not a number of rows")
    return schedule if saved == multipliers else _regrouped(schedule, saved, multipliers)


def _regrouped(schedule: dict[str, Any], saved: list[float], multipliers: list[float]) -> dict[str, Any]:
    """Sort what the schedule keeps for each parameter group by ``multipliers``."""

    def regrouped(values: list[Any]) -> list[Any]:
        by_multiplier = dict(zip(saved, values, strict=True))
        # A group that is new gets another's rate, scaled; other values (functions that JSON can't hold) are all alike.
        first = values[0] / saved[0] if _is_rate(values[0]) else None
        return [by_multiplier.get(m, values[0] if first is None else first * m) for m in multipliers]

    return {
        key: regrouped(value) if isinstance(value, list) and len(value) == len(saved) else value
        for key, value in schedule.items()
    }


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf


def restore_schedule(scheduler: LRScheduler, schedule: dict[str, Any], folder: Path) -> None:
    """Put a schedule's state back.

    Raises:
        SMTError: it is another kind of schedule's, or damaged.
    """
    path = folder / SCHEDULE_FILE
    own = scheduler.state_dict()
    for key in sorted(own.keys() | schedule.keys()):
        # Private keys come and go with torch's versions.
        if not key.startswith("_") and (key not in own or key not in schedule):
            raise SMTError(f"{path}: not a state of this --lr_scheduler_type ({shorten(key)})")
        if key in own and key in schedule and not _same_form(own[key], schedule[key]):
            raise SMTError(f"{path}: not a state of this --lr_scheduler_type ({key}: {shorten(repr(schedule[key]))})")
    try:
        scheduler.load_state_dict({key: schedule.get(key, value) for key, value in own.items()})
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SMTError(f"{path}: not a state of this --lr_scheduler_type ({first_line(error)})") from None


def _same_form(own: Any, saved: Any) -> bool:
    """Return whether ``saved`` can be a later value of ``own``: as many numbers of each kind."""
    if isinstance(own, list | tuple):
        return isinstance(saved, list) and len(own) == len(saved) and all(map(_same_form, own, saved))
    if isinstance(own, dict):
        return isinstance(saved, dict) and own.keys() == saved.keys() and all(_same_form(own[k], saved[k]) for k in own)
    if own is None or isinstance(own, bool | str):
        return type(own) is type(saved)
    # A schedule that waits for a better metric begins with infinity.
    return type(saved) in (int, float) and (abs(saved) < math.inf or saved == own)


def random_state() -> dict[str, Any]:
    """Return this process's random states (Python, NumPy, torch) as JSON can hold them.

    torch's are those of the CPU and of this process's device.
    """
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        **{key: value.tolist() for key, value in tensors.items()},
    }


def save_random_states(folder: Path, states: Sequence[dict[str, Any]]) -> None:
    """Write each rank's :func:`random_state`."""
    for rank, state in enumerate(states):
        (folder / _random_file(rank)).write_text(json.dumps(state))


def load_random_state(folder: Path, rank: int) -> bool:
    """Put this rank's random states back.

    Returns:
        False if there is none: the checkpoint comes from a smaller world size.

    Raises:
        SMTError: the file is malformed.
    """
    path = folder / _random_file(rank)
    if not path.exists():
        return False
    content = parse_json_object(read_text(path), str(path))
    try:
        version, numbers, gauss = content["python"]
        name, keys, position, has_gauss, cached = content["numpy"]
        # numpy itself would read beyond its state where the position lies there.
        if len(keys) != NUMPY_STATE or not 0 <= position <= NUMPY_STATE:
            raise ValueError("numpy's state has another size")
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(torch.tensor(content["torch"], dtype=torch.uint8))
        if torch.cuda.is_available() and "cuda" in content:
            torch.cuda.set_rng_state(torch.tensor(content["cuda"], dtype=torch.uint8))
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise SMTError(f"{path}: not a random state ({first_line(error)})") from None
    return True


def ranks_saved(folder: Path) -> int:
    """Return the number of ranks whose random states a checkpoint holds."""
    return len(list(folder.glob(_random_file("*"))))


def _random_file(rank: int | str) -> str:
    return f"rng_state_{rank}.json"
