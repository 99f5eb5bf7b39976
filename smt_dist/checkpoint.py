"""The training state on disk, beside an adapter: optimizer moments, schedule, random states.

Keyed by module, free of engine and world size (random states are kept per rank), and never pickled:
safetensors and JSON.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from smt_dist.engines import BlockState
from smt_dist.errors import SMTError
from smt_dist.files import parse_json_object, read_tensors, read_text, replace_file

OPTIMIZER_FILE = "smt_optimizer.safetensors"
SCHEDULE_FILE = "smt_schedule.json"


def save_moments(folder: Path, states: Iterable[BlockState], step: int) -> None:
    """Write the optimizer's moments as ``<module>:<moment>``, with its step count in the metadata."""
    tensors = {f"{state.module}:{key}": value.contiguous() for state in states for key, value in state.moments.items()}
    replace_file(folder / OPTIMIZER_FILE, lambda path: save_file(tensors, path, {"optimizer_step": str(step)}))


def load_states(folder: Path, deltas: dict[str, torch.Tensor]) -> tuple[Iterator[BlockState], int]:
    """The saved state of each module of ``deltas``, and the optimizer's step count.

    Raises:
        SMTError: the file is missing or damaged, or a moment of a module is missing or of another shape.
    """
    path = folder / OPTIMIZER_FILE
    tensors, metadata = read_tensors(path)
    keys = sorted({name.rpartition(":")[2] for name in tensors})
    moments: dict[str, dict[str, torch.Tensor]] = {}
    for name, delta in deltas.items():
        # A block that never got a gradient (an expert that no token reached) has no moments at all.
        moments[name] = {key: tensors[f"{name}:{key}"] for key in keys if f"{name}:{key}" in tensors}
        whole = all(tensor.shape == delta.shape for tensor in moments[name].values())
        if len(moments[name]) not in (0, len(keys)) or not whole:
            raise SMTError(f"{path}: a moment of {name} is missing or of another shape")
    step = metadata.get("optimizer_step", "0")
    if not step.isdigit():
        raise SMTError(f"{path}: optimizer_step is {step!r}, not a number")
    return (BlockState(name, delta, moments[name]) for name, delta in deltas.items()), int(step)


def save_schedule(folder: Path, schedule: dict[str, Any]) -> None:
    """Write the learning-rate schedule's state. JSON keeps every bit of a float."""
    replace_file(folder / SCHEDULE_FILE, lambda path: path.write_text(json.dumps(schedule)))


def load_schedule(folder: Path) -> dict[str, Any]:
    """Read the schedule's state. Raises SMTError if it is missing or malformed."""
    path = folder / SCHEDULE_FILE
    schedule = parse_json_object(read_text(path), str(path))
    rates = schedule.get("_last_lr")
    if not isinstance(rates, list) or not all(isinstance(rate, float | int) for rate in rates):
        raise SMTError(f"{path}: has no learning rates (_last_lr)")
    return schedule


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


def _random_file(rank: int) -> str:
    return f"rng_state_{rank}.json"
