"""Run a job on one machine or two nodes, with a fault or without, and tell its outcome."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import compiled_ops
from forks.client import ForkServer
from forks.job import ACTIVITIES, OUTPUT, Job
from harness import rank_environment, this_server
from programs import command_line
from two_nodes import Node, free_port, this_machine

LIMIT = 60.0  # seconds from a fault to the end of all ranks: the promise
CHECKPOINT_STATE = "trainer_state.json"


@dataclass
class Fault:
    """What is done to one rank, or to all.

    Attributes:
        signal: its number.
        ranks: to whom.
        activity: during which, by how its name begins.
        delay: seconds from there.
        pause: seconds after which a stopped rank is continued; None: never.
    """

    signal: int
    ranks: tuple[int, ...]
    activity: str
    delay: float = 0.0
    pause: float | None = None

    def told(self) -> dict[str, Any]:
        """What the ranks are told."""
        return {"signal": self.signal, "activity": self.activity, "delay": self.delay, "pause": self.pause}


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        codes: by rank: the exit code, minus the signal's number where it died of one; None: it hung or was stopped.
        seconds: by rank: from the first fault (from the start, without one) to its end.
        struck: rank -> the activity in which the fault struck; empty if it came too late.
        outputs: by rank.
        activities: by rank: (time, activity).
    """

    codes: dict[int, int | None]
    seconds: dict[int, float]
    struck: dict[int, str]
    outputs: dict[int, str]
    activities: dict[int, list[tuple[float, str]]] = field(repr=False)

    def first_step(self) -> int:
        """The first training step that rank 0 began; 0 for none."""
        steps = (activity for _, activity in self.activities[0] if activity.startswith("training, step "))
        return int(next(steps, "training, step 0:").removeprefix("training, step ").partition(":")[0])

    def described(self) -> str:
        """For messages."""
        return "\n".join(
            f"--- rank {rank}: exit code {code} after {self.seconds[rank]:.1f} s, struck: {self.struck.get(rank)} ---\n"
            + "\n".join(self.outputs[rank].splitlines()[-40:])
            for rank, code in self.codes.items()
        )


class Fleet:
    """Fork the ranks of launch/train.py from prepared parents.

    Args:
        nodes: where; each runs as many ranks of a job as the others. None: on this machine, from the parent that the
            whole session has.
    """

    def __init__(self, nodes: Sequence[Node] | None = None) -> None:
        self.nodes = list(nodes or [this_machine()])
        self._own = [ForkServer(node.enter()) for node in nodes or []]
        self._servers = self._own or [this_server]

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._own:
            server.close()

    def run(
        self,
        flags: dict[str, object],
        folder: Path,
        fault: Fault | None = None,
        world_size: int = 2,
        limit: float = LIMIT,
        meanwhile: Callable[[Path], None] | None = None,
    ) -> Outcome:
        """Run launch/train.py once.

        Args:
            flags: its command line.
            folder: for outputs; created.
            fault: if any.
            world_size: ranks, spread evenly over the nodes, in their order.
            limit: seconds from a fault until a rank counts as hanging.
            meanwhile: called with the folder while the ranks run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        compiled_ops.remove_locks()
        for server in self._servers:
            server.begin()
        for server in self._servers:
            server.start()  # no node's ranks wait for the other's parent
        port, per_node = free_port(), world_size // len(self.nodes)
        for index, server in enumerate(self._servers):
            ranks = range(index * per_node, (index + 1) * per_node)
            job = Job(
                folder.resolve(),
                world_size,
                {rank: self._environment(rank, world_size, per_node, port, self.nodes[index]) for rank in ranks},
                flags=command_line(flags),
                faults={rank: fault.told() for rank in ranks if fault is not None and rank in fault.ranks},
                limit=limit,
            )
            server.submit(job)
        if meanwhile is not None:
            meanwhile(folder)
        return self._outcome(folder, [server.result() for server in self._servers], world_size)

    def _outcome(self, folder: Path, found: list[dict[str, dict[int, Any]]], world_size: int) -> Outcome:
        ended = {rank: end for part in found for rank, end in part["ended"].items()}
        faults = {rank: fault for part in found for rank, fault in part["faults"].items()}
        activities = {rank: activities_of(folder, rank) for rank in range(world_size)}
        starts = [fault["time"] for fault in faults.values()] or [p[0][0] for p in activities.values() if p] or [0.0]
        return Outcome(
            codes={rank: ended[rank][0] for rank in range(world_size)},
            seconds={rank: ended[rank][1] - min(starts) for rank in range(world_size)},
            struck={rank: fault["activity"] for rank, fault in faults.items()},
            outputs={rank: (folder / OUTPUT.format(rank)).read_text(errors="replace") for rank in range(world_size)},
            activities=activities,
        )

    def _environment(self, rank: int, world_size: int, per_node: int, port: int, node: Node) -> dict[str, str]:
        return rank_environment(rank, world_size) | {
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "MASTER_ADDR": self.nodes[0].address,
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": node.interface,
            "TP_SOCKET_IFNAME": node.interface,
        }


def activities_of(folder: Path, rank: int) -> list[tuple[float, str]]:
    """What a rank has begun so far, with the times."""
    path = folder / ACTIVITIES.format(rank)
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(json.loads(line)) for line in lines if line.endswith("]")]


def newest_checkpoint(output: Path) -> int:
    """The step of the newest complete checkpoint; 0 for none."""
    states = output.glob(f"checkpoint-*/{CHECKPOINT_STATE}")
    return max((int(path.parent.name.rpartition("-")[2]) for path in states), default=0)


def memory_folder() -> str | None:
    """Where small files need no disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
