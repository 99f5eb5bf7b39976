"""Describe what a prepared parent is asked to do, as JSON for both sides."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

STARTED = 300.0  # seconds for a run that nobody hurts, on a busy machine
TIMEOUT = 150  # seconds for a worker, and for each of its collectives
# Files of a job's folder, by rank.
ACTIVITIES, FAULT, OUTPUT = "activities_{}.jsonl", "fault_{}.json", "output_{}.txt"


@dataclass
class Job:
    """Describe the ranks of a job that one parent forks, and how long it waits for them.

    Attributes:
        folder: the ranks' working directory, with their files.
        world_size: ranks of the job on all nodes.
        environments: rank -> its whole environment.
        worker: ``"module:function"``, called as ``function(folder, **arguments)``; None: launch/train.py.
        arguments: of the worker.
        flags: the command line of launch/train.py.
        faults: rank -> what is done to it, see :class:`faults.fleet.Fault`; ranks that nobody hurts aren't in it.
        timeout: seconds until a hang is called a hang.
        grace: seconds that the others get when a rank has failed; None: as if it had not.
        limit: seconds that all get from a fault on, in place of ``timeout``.
    """

    folder: Path
    world_size: int
    environments: dict[int, dict[str, str]]
    worker: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    faults: dict[int, dict[str, Any]] = field(default_factory=dict)
    timeout: float = STARTED
    grace: float | None = None
    limit: float = STARTED

    def to_json(self) -> dict[str, Any]:
        """Return what :meth:`from_json` takes."""
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, told: dict[str, Any]) -> Job:
        """Make the job that was told; JSON's keys are strings, and ranks are numbers."""
        by_rank = {
            name: {int(rank): value for rank, value in told[name].items()} for name in ("environments", "faults")
        }
        return cls(**{**told, **by_rank, "folder": Path(told["folder"])})
