"""Sample resident memory of a process and its descendants from Linux's ``/proc``."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

_PROC = Path("/proc")
_FIELDS = {"Rss": "resident", "Pss": "proportional", "Anonymous": "anonymous"}


@dataclass(frozen=True)
class Resident:
    """Hold bytes of all processes together.

    Attributes:
        resident: anonymous, shared and mapped from files; what processes share counts once for each.
        proportional: the same, but what several processes map counts in equal parts (PSS): no page twice.
        anonymous: what no file holds.
    """

    resident: int = 0
    proportional: int = 0
    anonymous: int = 0

    def __add__(self, other: Resident) -> Resident:
        return Resident(
            self.resident + other.resident,
            self.proportional + other.proportional,
            self.anonymous + other.anonymous,
        )


def own_bytes(field: str) -> int:
    """Return ``VmRSS`` or its peak ``VmHWM`` from Linux's ``/proc/self/status``."""
    lines = (_PROC / "self" / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def resident_of(process: int) -> Resident:
    """Return one process's bytes; zero if it has ended or can't be read."""
    try:
        lines = (_PROC / str(process) / "smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return Resident()
    sizes = {line.split()[0].rstrip(":"): int(line.split()[1]) * 1024 for line in lines[1:]}
    return Resident(**{name: sizes.get(field, 0) for field, name in _FIELDS.items()})


def descendants(process: int) -> list[int]:
    """Return a process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit() and (parent := _parent_of(folder)) is not None:
            children.setdefault(parent, []).append(int(folder.name))
    found = [process]
    for one in found:  # grows while it is read
        found += children.get(one, [])
    return found


def _parent_of(folder: Path) -> int | None:
    try:
        # The name before it, in brackets, may hold anything.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


@dataclass
class ResidentSampler:
    """Sample a process and its descendants in a thread, inside the context.

    Attributes:
        process: the number of the root process.
        seconds: between two samples.
        on_sample: called with the seconds since the start and each sample.
        samples: (seconds since the start, what all held then).
    """

    process: int
    seconds: float = 0.5
    on_sample: Callable[[float, Resident], None] = lambda _seconds, _resident: None
    samples: list[tuple[float, Resident]] = field(default_factory=list)

    @property
    def peak(self) -> Resident:
        """Return the largest of each kind, which need not occur at one moment."""
        found = [sample for _, sample in self.samples] or [Resident()]
        return Resident(
            max(sample.resident for sample in found),
            max(sample.proportional for sample in found),
            max(sample.anonymous for sample in found),
        )

    def __enter__(self) -> ResidentSampler:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        started = time.monotonic()
        while True:
            sample = sum(map(resident_of, descendants(self.process)), Resident())
            passed = time.monotonic() - started
            self.samples.append((passed, sample))
            self.on_sample(passed, sample)
            if self._ended.wait(self.seconds):
                return
