"""Record allocations: the CPU's from torch.profiler, a GPU's from its statistics."""

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
    """Describe one allocation or release.

    Attributes:
        nanoseconds: of the wall clock.
        address: of the first byte.
        bytes: given out; negative: taken back.
    """

    nanoseconds: int
    address: int
    bytes: int


class CpuAllocations:
    """Record the memory of every tensor and operator of this thread.

    From :meth:`start` to :meth:`stop`.

    Read from the trace that the profiler exports, its one public list with addresses.
    """

    def start(self) -> None:
        """Begin recording; the profiler's log grows until :meth:`stop`."""
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would print two lines for every recording
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> list[Allocation]:
        """End recording, and return the log."""
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
    """Read a GPU's peaks between calls from ``torch.cuda``'s own counters.

    Args:
        device: whose.
        cuda: the functions; another module for a test without a GPU.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda

    def start(self) -> None:
        """Reset the peaks to what exists now."""
        self._cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return the peak in bytes since the last call (or :meth:`start`)."""
        peak = self._cuda.max_memory_allocated(self._device)
        self._cuda.reset_peak_memory_stats(self._device)
        return peak

    def summary(self) -> dict[str, int]:
        """Return the allocator's reserved bytes and its number of retries."""
        statistics = self._cuda.memory_stats(self._device)
        names = {
            "reserved_peak_bytes": "reserved_bytes.all.peak",
            "fragmented_bytes": "inactive_split_bytes.all.current",
            "retries": "num_alloc_retries",
        }
        return {ours: statistics.get(theirs, 0) for ours, theirs in names.items()}


def resident_bytes(field: str) -> int | None:
    """Return this process's ``VmRSS`` (now) or ``VmHWM`` (its peak); None outside Linux.

    The peak counts from :func:`forget_resident_peak`.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def forget_resident_peak(write: Callable[[str], Any] = Path("/proc/self/clear_refs").write_text) -> bool:
    """Reset ``VmHWM`` to what is resident now; return False where that is forbidden.

    It is then the peak of the whole process.
    """
    try:
        write("5")
    except OSError:
        return False
    return True
