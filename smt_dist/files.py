"""Reading and writing files: one clear line where one can't be read, and never half a file."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from smt_dist.errors import SMTError


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
