"""Read and write files, with one-line errors and atomic replacement."""

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
# The largest JSON file: 20 million blocks, or a million logged steps. Parsed, it takes ten times as much memory.
MAX_JSON_BYTES = 256 * 1024**2
MAX_SHOWN = 80  # characters of a wrong value in a message


def read_text(path: str | Path) -> str:
    """Read a file's text.

    Raises:
        SMTError: it can't be read, isn't a regular file of at most :data:`MAX_JSON_BYTES`, or isn't UTF-8; names it.
    """
    try:
        status = os.stat(path)
        # Reading a pipe or a device might never end.
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
    """Parse JSON of any type.

    Raises:
        SMTError: ``text`` isn't JSON, nests too deeply, or holds a number of thousands of digits or an object with
            the same key twice (readers silently take one of the two); names the source.
    """
    try:
        return json.loads(text, object_pairs_hook=refuse_double_keys)
    except (ValueError, RecursionError) as error:
        raise SMTError(f"{source}: not valid JSON ({error})") from None


def parse_json_object(text: str, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        SMTError: as :func:`parse_json`, or the JSON isn't an object.
    """
    content = parse_json(text, source)
    if not isinstance(content, dict):
        raise SMTError(f"{source}: expected a JSON object")
    return content


def refuse_double_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for ``json.loads``'s ``object_pairs_hook``.

    Raises:
        ValueError: an object has the same key twice.
    """
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"the key {shorten(repr(key))} appears twice in one object")
        content[key] = value
    return content


def shorten(text: str) -> str:
    """Cut the text of a wrong value to :data:`MAX_SHOWN` characters for a message."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class TensorKind(NamedTuple):
    """Describe a tensor of a safetensors file: its shape and its dtype's name (``F32``)."""

    shape: tuple[int, ...]
    dtype: str


def read_header(path: Path) -> tuple[dict[str, TensorKind], dict[str, str]]:
    """Read the tensors' shapes and dtypes and the metadata of a safetensors file, but no tensor.

    The library checks that the header fits the file's length.

    Returns:
        Name -> shape and dtype; and the metadata.

    Raises:
        SMTError: the file is missing or damaged; names it.
    """
    with _open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {n: TensorKind(tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}, file.metadata() or {}


def check_tensors(
    path: Path, found: Mapping[str, TensorKind], wanted: Mapping[str, tuple[int, ...]], whose: str
) -> None:
    """Compare a header with the expected fp32 tensors.

    Args:
        path: of the file.
        found: from :func:`read_header`.
        wanted: name -> shape.
        whose: describes the expected tensors in the message.

    Raises:
        SMTError: a tensor is missing, extra, or of another shape or dtype; names the first one.
    """
    if different := sorted(found.keys() ^ wanted.keys()):
        what = "is missing" if different[0] in wanted else "doesn't belong here"
        raise SMTError(f"{path}: {shorten(different[0])} {what}; expected are {whose}")
    for name, expected in wanted.items():
        if found[name] != (expected, "F32"):
            raise SMTError(f"{path}: {name} is {found[name].shape} {found[name].dtype}, expected {expected} F32")


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Load all tensors and the metadata of a safetensors file.

    Returns:
        Name -> tensor, on the CPU, a view of the memory-mapped file; and the metadata.

    Raises:
        SMTError: the file is missing or damaged; names it.
    """
    with _open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
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
    """Write fp32 tensors to a safetensors file, with only one of them in memory at a time.

    The safetensors library needs all of them at once. The format is the header's length (8 bytes, little endian), the
    header (JSON, padded with spaces to 8 bytes) and the tensors (https://github.com/huggingface/safetensors#format).

    Args:
        path: the file.
        shapes: name -> shape, in the order of ``tensors``.
        tensors: (name, tensor of that shape); written as fp32.
        metadata: the header's metadata.

    Raises:
        RuntimeError: a tensor is missing, extra, out of order, or of another shape (such as a partitioned one).
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
            del tensor  # free it before the next one is made
        for found, _ in given:
            raise RuntimeError(f"{found}: one tensor too many")


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file atomically: write a temporary file beside it, sync, rename.

    A reader sees the old file or the new file, never a part of it.

    Args:
        path: the file.
        write: writes the content to the path passed to it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer with ``save_pretrained``.

    Raises:
        OSError: a file can't be written; the tokenizers library raises a bare Exception for that.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from None
