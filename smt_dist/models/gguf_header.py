"""Check the counts in a GGUF file's header against the file's length.

A reader would otherwise allocate and loop as they say. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from smt_dist.errors import SMTError
from smt_dist.files import shorten

GGUF_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Value type -> struct's letter.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_DIMENSIONS = 4
_MAX_NAME = 65535  # bytes, as the format says
_MAX_DEPTH = 2  # arrays in arrays
# The fewest bits of an element: ggml's smallest blocks take 1.5.
_BITS = 1.5
# The keys of a model's sizes, without the architecture's name.
_SIZES = (
    *("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv", "vocab_size"),
    *("rope.dimension_count", "attention.key_length", "attention.value_length"),
)


def check_gguf_header(path: Path) -> None:
    """Check the header of a GGUF file.

    Raises:
        SMTError: the file isn't GGUF, is cut short, or names more values, tensors or layers than it can hold.
    """
    try:
        with open(path, "rb") as file:
            _Header(path, file).check()
    except FileNotFoundError:
        raise SMTError(f"{path}: no such file") from None
    except OSError as error:
        raise SMTError(f"{path}: can't be read: {error.strerror}") from None


class _Header:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.size = path.stat().st_size

    def check(self) -> None:
        if self.file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise SMTError(f"{self.path}: isn't a GGUF file (it doesn't begin with 'GGUF')")
        version = self.number("I")
        if version not in _VERSIONS:
            raise SMTError(f"{self.path}: GGUF version {version} (or byte order) is not supported; 2 and 3 are")
        tensors, values = self.number("Q"), self.number("Q")
        self.must_fit(24 * tensors, f"{tensors:,} tensors")
        self.must_fit(13 * values, f"{values:,} values")
        read = [(self.string(_MAX_NAME), self.value(self.number("I"))) for _ in range(values)]
        longest = max((self.tensor() for _ in range(tensors)), default=0)
        for key, value in read:
            _, _, name = key.partition(".")
            limit = longest if name in _SIZES else tensors if name == "block_count" else None
            if limit is not None and isinstance(value, int) and value > limit:
                raise self.error(f"{shorten(key)} is {value:,}: more than its tensors can hold")

    def tensor(self) -> int:
        """Check the next tensor's description and return its longest side."""
        name = self.string(_MAX_NAME)
        count = self.number("I")
        if count > _MAX_DIMENSIONS:
            raise self.error(f"tensor {shorten(name)} has {count} dimensions")
        sides = [self.number("Q") for _ in range(count)]
        self.number("I")  # its type
        offset = self.number("Q")
        if offset > self.size or math.prod(sides) * _BITS / 8 > self.size:
            raise self.error(f"tensor {shorten(name)} of {sides} doesn't fit into the file")
        return max(sides, default=1)

    def value(self, kind: int, depth: int = 0) -> int | float | bool | str | None:
        """Read a number or a string; read an array through and return None."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            if kind not in _NUMBERS:
                raise self.error(f"value type {kind} is unknown")
            return self.number(_NUMBERS[kind])
        inner, count = self.number("I"), self.number("Q")
        if depth >= _MAX_DEPTH:
            raise self.error("arrays are nested too deeply")
        if inner in _NUMBERS:
            length = count * struct.calcsize(_NUMBERS[inner])
            self.must_fit(length, f"an array of {count:,}")
            self.file.seek(length, 1)
            return None
        self.must_fit(8 * count, f"an array of {count:,}")
        for _ in range(count):
            self.value(inner, depth + 1)
        return None

    def number(self, letter: str) -> int | float | bool:
        length = struct.calcsize(letter)
        data = self.file.read(length)
        if len(data) != length:
            raise self.error("it is cut short")
        return struct.unpack(f"<{letter}", data)[0]

    def string(self, longest: int | None = None) -> str:
        length = self.number("Q")
        self.must_fit(length, f"a text of {length:,} bytes")
        if longest is not None and length > longest:
            raise self.error(f"a name of {length:,} bytes is too long")
        return self.file.read(length).decode("utf-8", "replace")

    def must_fit(self, length: int, what: str) -> None:
        if length > self.size - self.file.tell():
            raise self.error(f"{what} can't fit in the rest of the file")

    def error(self, problem: str) -> SMTError:
        return SMTError(f"{self.path}: damaged GGUF header: {problem}")
