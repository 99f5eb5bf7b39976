"""Damage done to files on purpose, with or without a manifest that fits it."""

from __future__ import annotations

import random
import resource
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smt_dist.checkpoint.atomic import write_manifest
from smt_dist.errors import SMTError

HEADROOM = 2 * 1024**3  # bytes of address space; what is damaged are kilobytes

# Where parsers go wrong: nesting, huge numbers, what JSON doesn't know, keys that stand twice.
BOMBS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b"NaN",
    b'"text"',
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"9" * 10_000,
    b'{"format_version": 1e400}',
    b'{"format_version": 2}',
    b'{"blocks": {}, "blocks": {}}',
    b'{"a": "\\ud800"}',
    b"\xff\xfe{}",
    b"\x00" * 64,
    struct.pack("<Q", 2**63) + b"{}",
    struct.pack("<Q", 2**30) + b"{}",
    struct.pack("<Q", 2) + b"{}",
)
# What a text format may stumble over in the place of a value.
VALUES = (b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"', b"9" * 30, b"\xff")


def reseal(folder: Path) -> Path:
    """Make the manifest fit the files again: what a check behind it then finds is what is tested."""
    write_manifest(folder)
    return folder


def mutations(content: bytes, count: int, seed: int, others: tuple[bytes, ...] = BOMBS) -> list[bytes]:
    """``content`` with bytes flipped, replaced, cut out, put in twice, truncated or extended; and ``others``."""
    draw = random.Random(seed)
    found = list(others)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2, 8))):
            at = draw.randrange(len(changed) + 1) if changed else 0
            end = min(len(changed), at + draw.choice((1, 2, 4, 8, 64)))
            kind = draw.randrange(6)
            if kind == 0 and at < len(changed):
                changed[at] ^= 1 << draw.randrange(8)
            elif kind == 1:
                changed[at:end] = bytes(draw.randrange(256) for _ in range(end - at))
            elif kind == 2:
                del changed[at:end]
            elif kind == 3:
                changed[at:at] = changed[at:end]
            elif kind == 4:
                del changed[at:]
            else:
                changed[at:end] = draw.choice(VALUES)
        found.append(bytes(changed))
    return found


@contextmanager
def capped_memory() -> Iterator[None]:
    """What is allocated inside beyond :data:`HEADROOM` is a MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read: Callable[[], Any]) -> str | None:
    """The refusal of ``read``, which is one line that a terminal can show; None if it has a result.

    Anything else, too much memory included, is raised.
    """
    refusal = None
    try:
        with capped_memory():
            read()
    except SMTError as error:
        refusal = str(error)
    assert refusal is None or (refusal.isprintable() and len(refusal) < 2500)
    return refusal
