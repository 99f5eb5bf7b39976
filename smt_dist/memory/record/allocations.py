"""What an allocator gave out and took back: the CPU's as torch.profiler saw it, a GPU's as its statistics tell."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

CPU = 0  # of the profiler's "Device Type"


class Allocation(NamedTuple):
    """One change.

    Attributes:
        nanoseconds: of the wall clock.
        address: of the first byte.
        bytes: given out; negative: taken back.
    """

    nanoseconds: int
    address: int
    bytes: int


class CpuAllocations:
    """Every tensor's and every operator's own memory, between :meth:`start` and :meth:`stop`, of this thread.

    Read from the trace that the profiler exports, its one public list with addresses.
    """

    def start(self) -> None:
        """Begin; the profiler's log grows until :meth:`stop`."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print two lines for every recording
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> list[Allocation]:
        """End, and give up the log."""
        self._profile.stop()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            del self._profile
            trace = json.loads(path.read_bytes())
        start = trace["baseTimeNanoseconds"]
        events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
        events = [event for event in events if event["args"]["Device Type"] == CPU]
        events.sort(key=lambda event: event["args"]["Ev Idx"])
        return [
            Allocation(start + round(1000 * event["ts"]), event["args"]["Addr"], event["args"]["Bytes"])
            for event in events
        ]


class CudaStatistics:
    """A GPU's peaks between calls, from ``torch.cuda``'s own counters.

    Args:
        device: whose.
        cuda: the functions; another module for a test without a GPU.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda

    def start(self) -> None:
        """Let peaks begin at what is there now."""
        self._cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Bytes of the largest moment since the last call (or :meth:`start`)."""
        peak = self._cuda.max_memory_allocated(self._device)
        self._cuda.reset_peak_memory_stats(self._device)
        return peak

    def summary(self) -> dict[str, int]:
        """What else the allocator knows: bytes that it holds for itself, and how often it had to free and try again."""
        statistics = self._cuda.memory_stats(self._device)
        names = {
            "reserved_peak_bytes": "reserved_bytes.all.peak",
            "fragmented_bytes": "inactive_split_bytes.all.current",
            "retries": "num_alloc_retries",
        }
        return {ours: statistics.get(theirs, 0) for ours, theirs in names.items()}


def resident_bytes(field: str) -> int | None:
    """This process's ``VmRSS`` (now) or ``VmHWM`` (the most since :func:`forget_resident_peak`); None outside Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def forget_resident_peak(write: Callable[[str], Any] = Path("/proc/self/clear_refs").write_text) -> bool:
    """Let ``VmHWM`` begin at what is resident now; False where that is forbidden: then it is the process's whole."""
    try:
        write("5")
    except OSError:
        return False
    return True
