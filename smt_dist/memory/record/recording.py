"""Define ``Recording``, what one rank recorded of its memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from smt_dist.memory.plan.categories import Memory
from smt_dist.memory.record.timeline import Timeline


@dataclass
class Recording:
    """Hold what one rank recorded.

    Attributes:
        rank: its number.
        device: such as ``cpu`` or ``cuda:0``.
        peaks: phase -> (moment, what was held).
        resident: phase -> bytes of the process's peak resident memory; with the recorder's own log where it recorded.
        resident_unrecorded: the same over a phase's steps that weren't recorded.
        allocator: of a GPU: see :meth:`CudaStatistics.summary`.
        batches: phase -> the largest micro-batch that was recorded: (rows, tokens a row).
        timelines: of each recorded stretch.
    """

    rank: int
    device: str
    peaks: dict[str, tuple[str, Memory]] = field(default_factory=dict)
    resident: dict[str, int] = field(default_factory=dict)
    resident_unrecorded: dict[str, int] = field(default_factory=dict)
    allocator: dict[str, int] = field(default_factory=dict)
    batches: dict[str, tuple[int, int]] = field(default_factory=dict)
    timelines: list[Timeline] = field(default_factory=list)

    def add(self, timeline: Timeline) -> None:
        """Add a stretch that ended; its peaks replace smaller ones."""
        for phase, (moment, memory) in timeline.peaks().items():
            if phase not in self.peaks or memory.total > self.peaks[phase][1].total:
                self.peaks[phase] = moment, memory
        self.timelines.append(timeline.thinned())

    def to_json(self) -> dict[str, Any]:
        """Return plain values; bytes are whole numbers."""
        return {
            "rank": self.rank,
            "device": self.device,
            "phases": {
                phase: {"moment": moment, "peak": memory.to_json()} for phase, (moment, memory) in self.peaks.items()
            },
            "resident_bytes": self.resident,
            "resident_bytes_unrecorded": self.resident_unrecorded,
            "allocator": self.allocator,
            "batches": {phase: {"rows": rows, "tokens": tokens} for phase, (rows, tokens) in self.batches.items()},
            "timelines": [timeline.to_json() for timeline in self.timelines],
        }
