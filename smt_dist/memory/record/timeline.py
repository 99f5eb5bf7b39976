"""Describe what a rank held by category over time, and its peaks by phase."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smt_dist.memory.plan.categories import CATEGORIES, Memory
from smt_dist.memory.record.allocations import Allocation
from smt_dist.memory.record.real_tracker import Mark, Place

# The tracker notes a tensor when its operator is done, so after the allocator gave the memory out. The two clocks are
# one, but the profiler's is read from the processor's counter and set right at the end: they differ by under this.
CLOCK_ERROR = 20_000  # nanoseconds
_TEMPORARY = CATEGORIES.index("temporary")
_INDEX = {name: index for index, name in enumerate(CATEGORIES)}


@dataclass
class _Piece:
    start: int
    end: int | None
    bytes: int
    category: int = _TEMPORARY


@dataclass
class Timeline:
    """Hold what was held from each change on.

    Attributes:
        nanoseconds: int64 ``[n]``, of the wall clock, sorted.
        levels: int64 ``[n, categories]``, bytes, in the order of :data:`CATEGORIES`.
        marks: sorted; the first is where the recording began.
    """

    nanoseconds: np.ndarray
    levels: np.ndarray
    marks: list[Mark]

    def peaks(self) -> dict[str, tuple[str, Memory]]:
        """Return phase -> (moment, memory) at its peak."""
        totals = self.levels.sum(1)
        best: dict[str, tuple[int, str, int]] = {}
        for mark, (first, last) in zip(self.marks, self._rows(), strict=True):
            row = first + int(totals[first:last].argmax())
            if mark.phase not in best or totals[row] > best[mark.phase][0]:
                best[mark.phase] = int(totals[row]), mark.moment, row
        return {phase: (moment, self._memory(row)) for phase, (_, moment, row) in best.items()}

    def raised(self, peaks: list[int]) -> Timeline:
        """Raise the peaks to the allocator's, one per mark.

        What the tracker didn't see is temporary.
        """
        levels = self.levels.copy()
        totals = levels.sum(1)
        for peak, (first, last) in zip(peaks, self._rows(), strict=True):
            row = first + int(totals[first:last].argmax())
            levels[row, _TEMPORARY] += max(0, peak - int(totals[row]))
        return Timeline(self.nanoseconds, levels, self.marks)

    def thinned(self, points: int = 1000) -> Timeline:
        """Reduce to about as many rows, keeping peaks.

        Of rows that are joined, the largest stays.
        """
        if len(self.nanoseconds) <= points:
            return self
        totals = self.levels.sum(1)
        runs = np.array_split(np.arange(len(totals)), points)
        rows = np.array([run[totals[run].argmax()] for run in runs])
        return Timeline(self.nanoseconds[rows], self.levels[rows], self.marks)

    def to_json(self) -> dict[str, Any]:
        """Return seconds since the first mark, and bytes by category."""
        start = self.marks[0].nanoseconds
        return {
            "seconds": [round(float(t - start) / 1e9, 6) for t in self.nanoseconds],
            "bytes": {name: self.levels[:, index].tolist() for name, index in _INDEX.items()},
            "marks": [
                {"seconds": round((mark.nanoseconds - start) / 1e9, 6), "phase": mark.phase, "moment": mark.moment}
                for mark in self.marks
            ],
        }

    def _rows(self) -> list[tuple[int, int]]:
        """Return (first, end) of each mark's rows.

        A mark has its own row, since what existed when it began counts too.
        """
        starts = [mark.nanoseconds for mark in self.marks]
        last = len(self.nanoseconds)
        firsts = [min(int(row), last - 1) for row in np.searchsorted(self.nanoseconds, starts)]
        return [(first, max(end, first + 1)) for first, end in zip(firsts, [*firsts[1:], last], strict=True)]

    def _memory(self, row: int) -> Memory:
        return Memory(**dict(zip(CATEGORIES, map(int, self.levels[row]), strict=True)))


def timeline_of_allocations(
    allocations: Iterable[Allocation], stretches: Iterable[tuple[str, Place, int | None]], marks: list[Mark]
) -> Timeline:
    """Combine the allocator's bytes with the tracker's categories.

    Args:
        allocations: between start and stop, in order.
        stretches: :meth:`RealTracker.stretches`; what was there before the first mark is taken from here.
        marks: the first when everything that was there had been registered.
    """
    start = marks[0].nanoseconds
    before, inside = [], []
    for stretch in stretches:
        (before if stretch[1].nanoseconds <= start else inside).append(stretch)
    held = {place.address: _Piece(start, end, place.bytes, _INDEX[name]) for name, place, end in before}
    pieces, by_address = _pieces(allocations, held)
    for name, place, end in inside:
        found = by_address.get(place.address, [])
        index = bisect_right(found, place.nanoseconds + CLOCK_ERROR, key=lambda piece: piece.start) - 1
        if index >= 0:
            found[index].category = _INDEX[name]
            # What a collective's thread took back, the profiler, which sees one thread, didn't.
            found[index].end = found[index].end or end
    return _sweep([*held.values(), *pieces], marks)


def timeline_of_stretches(stretches: Iterable[tuple[str, Place, int | None]], marks: list[Mark]) -> Timeline:
    """Build a timeline from the tracker alone, without operators' own memory."""
    start = marks[0].nanoseconds
    pieces = [_Piece(max(start, place.nanoseconds), end, place.bytes, _INDEX[name]) for name, place, end in stretches]
    return _sweep(pieces, marks)


def _pieces(allocations: Iterable[Allocation], held: dict[int, _Piece]) -> tuple[list[_Piece], dict[int, list[_Piece]]]:
    """Sort allocations in time and by address.

    An allocation ends what its memory held before.
    """
    live: dict[int, _Piece] = {}
    pieces: list[_Piece] = []
    by_address: dict[int, list[_Piece]] = {}
    for allocation in allocations:
        if allocation.bytes > 0:
            if allocation.address in live:  # taken back by another thread
                live.pop(allocation.address).end = allocation.nanoseconds
            piece = _Piece(allocation.nanoseconds, None, allocation.bytes)
            live[allocation.address] = piece
            pieces.append(piece)
            by_address.setdefault(allocation.address, []).append(piece)
        elif allocation.address in live:
            live.pop(allocation.address).end = allocation.nanoseconds
        elif allocation.address in held:  # the profiler knows it from an earlier recording
            piece = held[allocation.address]
            piece.end = allocation.nanoseconds if piece.end is None else min(piece.end, allocation.nanoseconds)
    return pieces, by_address


def _sweep(pieces: list[_Piece], marks: list[Mark]) -> Timeline:
    changes = [(mark.nanoseconds, 0, 0) for mark in marks]
    changes += [(piece.start, piece.category, piece.bytes) for piece in pieces]
    changes += [(piece.end, piece.category, -piece.bytes) for piece in pieces if piece.end is not None]
    changes.sort(key=lambda change: change[0])  # stable: what begins at an instant before what ends at it
    deltas = np.zeros((len(changes), len(CATEGORIES)), dtype=np.int64)
    for row, (_, category, size) in enumerate(changes):
        deltas[row, category] = size
    times = np.array([time for time, _, _ in changes], dtype=np.int64)
    return Timeline(times, deltas.cumsum(0), marks)
