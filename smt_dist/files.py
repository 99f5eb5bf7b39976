"""Reading and writing files: one clear line where one can't be read, and never half a file."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from smt_dist.errors import SMTError, first_line

FLOAT32_BYTES = 4
# Of one JSON file: 20 million blocks, or a million logged steps. Parsed, it takes ten times as much.
MAX_JSON_BYTES = 256 * 1024**2
MAX_SHOWN = 80  # characters of a wrong value in a message


def read_text(path: str | Path) -> str:
    """A file's text.

    Raises:
        SMTError: it can't be read, isn't a regular file of at most :data:`MAX_JSON_BYTES`, or isn't UTF-8; names it.
    """
    try:
        status = os.stat(path)
        # Reading a pipe or a device may never end.
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            raise SMTError(f"{path}: not a regular file")
        if status.st_size > MAX_JSON_BYTES:
            raise SMTError(f"{path}: {status.st_size:,} bytes are too many; at most {MAX_JSON_BYTES:,}")
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SMTError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise SMTError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # a null byte in the name
        raise SMTError(f"{str(path)!r}: {error}") from None


def parse_json(text: str, source: str) -> Any:
    """Parse JSON, whatever it holds.

    Raises:
        SMTError: ``text`` is no JSON, nests too deeply, holds a number of thousands of digits, or the same key twice in
            an object, of which readers silently take one; names the source.
    """
    try:
        return json.loads(text, object_pairs_hook=refuse_double_keys)
    except (ValueError, RecursionError) as error:
        raise SMTError(f"{source}: not valid JSON ({error})") from None


def parse_json_object(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        SMTError: as :func:`parse_json`, or it is no object.
    """
    content = parse_json(text, source)
    if not isinstance(content, dict):
        raise SMTError(f"{source}: expected a JSON object")
    return content


def refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``json.loads``: a ValueError where an object has a key twice."""
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {shorten(repr(key))} stands twice in one object")
        content[key] = value
    return content


def shorten(text: str) -> str:
    """At most :data:`MAX_SHOWN` characters of what is shown of a wrong value."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class TensorKind(NamedTuple):
    """What a safetensors file says of a tensor: its shape, and its dtype by the format's name (``F32``)."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> tuple[dict[str, TensorKind], dict[str, str]]:
    """Shapes and dtypes of a safetensors file's tensors, and its metadata; no tensor is made.

    The library checks that the header fits the file's length.

    Raises:
        SMTError: it is missing or damaged; names the file.
    """
    with _open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {n: TensorKind(tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}, file.metadata() or {}


def check_tensors(
    path: Path, found: Mapping[str, TensorKind], wanted: Mapping[str, tuple[int, ...]], whose: str
) -> None:
    """Compare a header with the fp32 tensors that are expected.

    Args:
        path: of the file.
        found: see :func:`read_header`.
        wanted: name -> shape.
        whose: what the names are expected to be those of.

    Raises:
        SMTError: the first tensor that is missing, extra, or of another shape or dtype.
    """
    if different := sorted(found.keys() ^ wanted.keys()):
        what = "is missing" if different[0] in wanted else "doesn't belong here"
        raise SMTError(f"{path}: {shorten(different[0])} {what}; expected are {whose}")
    for name, expected in wanted.items():
        if found[name] != (expected, "F32"):
            raise SMTError(f"{path}: {name} is {found[name].shape} {found[name].dtype}, expected {expected} F32")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """All tensors (on the CPU, views of the mapped file) and the metadata of a safetensors file.

    Raises:
        SMTError: it is missing or damaged; names the file.
    """
    with _open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    if path.exists() and not path.is_file():  # opening a pipe would wait for somebody who writes into it
        raise SMTError(f"{path}: not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise SMTError(f"{path}: No such file or directory") from None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise SMTError(f"{path}: damaged or not a safetensors file ({first_line(error)})") from None


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


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Its ``save_pretrained``.

    Raises:
        OSError: a file can't be written; the tokenizers library has only bare exceptions for that.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None
