"""The training state on disk, beside an adapter: optimizer moments, schedule, random states.

Keyed by module, free of engine and world size (random states are kept per rank), and never pickled:
safetensors and JSON.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LRScheduler

from smt_dist.engines import BlockState, Moments
from smt_dist.errors import SMTError
from smt_dist.files import parse_json_object, read_tensors, read_text, replace_file, write_tensors

OPTIMIZER_FILE = "smt_optimizer.safetensors"
SCHEDULE_FILE = "smt_schedule.json"
GLOBAL_BATCH = "global_batch_size"


def save_moments(folder: Path, shapes: Mapping[str, tuple[int, ...]], moments: Moments) -> None:
    """Write the optimizer's state as ``<module>:<moment>``, tensor by tensor, with its counters in the metadata.

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
    replace_file(folder / OPTIMIZER_FILE, lambda path: write_tensors(path, names, tensors, metadata))


def load_states(
    folder: Path, deltas: Mapping[str, torch.Tensor], kept: tuple[list[str], list[str]] | None = None
) -> tuple[Iterator[BlockState], dict[str, int | float]]:
    """The saved state of each module of ``deltas``, and the optimizer's counters.

    Tensors are views of the mapped file: what is copied out of them is all that is read.

    Args:
        folder: the checkpoint.
        deltas: module -> master.
        kept: the moments and the counters that the optimizer keeps (:func:`smt_dist.elementwise.state_names`);
            None where that isn't known.

    Raises:
        SMTError: the file is missing or damaged, a moment of a module is missing or of another shape, or the file was
            saved by an optimizer that keeps something else.
    """
    path = folder / OPTIMIZER_FILE
    tensors, metadata = read_tensors(path)
    keys = sorted({name.rpartition(":")[2] for name in tensors})
    for name, delta in deltas.items():
        for key in keys:
            if f"{name}:{key}" not in tensors or tensors[f"{name}:{key}"].shape != delta.shape:
                raise SMTError(f"{path}: {key} of {name} is missing or of another shape")
    if "counters" not in metadata:
        raise SMTError(f"{path}: has no counters: it was written by another version of smt_dist")
    counters = parse_json_object(metadata["counters"], f"{path}: counters")
    if not all(isinstance(value, int | float) for value in counters.values()):
        raise SMTError(f"{path}: counters are {counters}, not numbers")
    if kept is not None and kept != (keys, sorted(counters)):
        saved, wanted = ", ".join(keys + sorted(counters)), ", ".join(kept[0] + kept[1])
        raise SMTError(
            f"{path}: holds {saved or 'nothing'}, but --optim keeps {wanted or 'nothing'}; give the optimizer that it "
            "was saved with"
        )
    states = (
        BlockState(name, delta, {key: tensors[f"{name}:{key}"] for key in keys}) for name, delta in deltas.items()
    )
    return states, counters


def save_schedule(folder: Path, schedule: dict[str, Any], global_batch: int) -> None:
    """Write the learning-rate schedule's state and the rows of a step. JSON keeps every bit of a float."""
    content = json.dumps({**schedule, GLOBAL_BATCH: global_batch})
    replace_file(folder / SCHEDULE_FILE, lambda path: path.write_text(content))


def load_schedule(folder: Path, groups: int) -> dict[str, Any]:
    """Read the schedule's state, for ``groups`` parameter groups. Raises SMTError if it is missing or malformed."""
    path = folder / SCHEDULE_FILE
    schedule = parse_json_object(read_text(path), str(path))
    rates = schedule.get("_last_lr")
    if not isinstance(rates, list) or not all(isinstance(rate, float | int) for rate in rates) or len(rates) != groups:
        raise SMTError(f"{path}: has no learning rates (_last_lr) of {groups} parameter groups")
    return schedule


def restore_schedule(scheduler: LRScheduler, schedule: dict[str, Any], folder: Path) -> None:
    """Put a schedule's state back. Raises SMTError if it is another kind of schedule's, or damaged."""
    try:
        scheduler.load_state_dict(schedule)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise SMTError(f"{folder / SCHEDULE_FILE}: not a state of this --lr_scheduler_type ({error!r})") from None


def save_random_state(folder: Path, rank: int) -> None:
    """Write this rank's random states: python, numpy, torch on the CPU and on its device."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    content = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        **{key: value.tolist() for key, value in tensors.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / _random_file(rank), lambda path: path.write_text(json.dumps(content)))


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
        random.setstate((version, tuple(numbers), gauss))
        np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        torch.set_rng_state(torch.tensor(content["torch"], dtype=torch.uint8))
        if torch.cuda.is_available() and "cuda" in content:
            torch.cuda.set_rng_state(torch.tensor(content["cuda"], dtype=torch.uint8))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SMTError(f"{path}: not a random state ({error})") from None
    return True


def ranks_saved(folder: Path) -> int:
    """The number of ranks whose random states a checkpoint holds."""
    return len(list(folder.glob(_random_file("*"))))


def _random_file(rank: int | str) -> str:
    return f"rng_state_{rank}.json"
