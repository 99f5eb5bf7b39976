"""Reading and writing files: one clear line where one can't be read, and never half a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from smt_dist.errors import SMTError

FLOAT32_BYTES = 4


def read_text(path: str | Path) -> str:
    """A file's text.

    Raises:
        SMTError: it can't be read or isn't UTF-8; names the file.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SMTError(f"{path}: {reason}") from None


def parse_json_object(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        SMTError: ``text`` is no JSON, or no object; names the source.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise SMTError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise SMTError(f"{source}: expected a JSON object")
    return content


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors (on the CPU) and the metadata of a safetensors file.

    Raises:
        SMTError: it is missing or damaged; names the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise SMTError(f"{path}: No such file or directory") from None
    except (SafetensorError, OSError) as error:
        raise SMTError(f"{path}: damaged or not a safetensors file ({error})") from None


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: dict[str, str],
) -> None:
    """Write fp32 tensors as a safetensors file, one at a time: only one is ever needed in memory.

    The safetensors library wants all of them at once. The format: the header's length (8 bytes, little endian), the
    header (JSON, padded with spaces to 8 bytes), the tensors (https://github.com/huggingface/safetensors#format).

    Args:
        path: the file.
        shapes: name -> shape, in the order of ``tensors``.
        tensors: (name, tensor of that shape); written as fp32.
        metadata: what goes into the header beside the tensors.

    Raises:
        RuntimeError: a tensor is missing, extra, out of order, or not of its shape, as a partitioned one wouldn't be.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + FLOAT32_BYTES * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        given = iter(tensors)
        for name, shape in shapes.items():
            found, tensor = next(given, ("nothing", torch.empty(0)))
            if found != name or tuple(tensor.shape) != tuple(shape):
                raise RuntimeError(f"{found}: the tensor is {tuple(tensor.shape)}, expected {name} of {tuple(shape)}")
            file.write(tensor.detach().to("cpu", torch.float32).contiguous().numpy().data)
            del tensor  # before the next one is made
        for found, _ in given:
            raise RuntimeError(f"{found}: one tensor too many")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside ``path``, sync, rename: a reader sees the old file or the new one, never half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
