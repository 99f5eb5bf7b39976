"""What a fault may do to a run, and what it may not."""

from __future__ import annotations

import re
import signal
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from programs import LAUNCH, train_flags

from faults.fleet import LIMIT, Fault, Fleet, Outcome, newest_checkpoint

STEPS, SAVE_STEPS = 6, 2
HEARTBEAT_SECONDS = 10
BLOCKS = "smt_blocks.safetensors"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
BEFORE_TRAINING = ("load", "data", "warm-up", "selection", "attaching the blocks", "preparing to train")
ACTIVITIES = (
    *BEFORE_TRAINING,
    *(f"training, step {step}: {part}" for step in (1, 3, 5) for part in ("forward", "backward", "optimizer step")),
    *(f"{what} step {step}" for step in (2, 4) for what in ("evaluation after", "saving")),
    f"saving step {STEPS}",
)


class Kind(NamedTuple):
    """A way to hurt a run.

    Attributes:
        signal: what rank or ranks get; None: the link between two nodes is cut.
        all_ranks: whether all get it.
        pause: seconds until a stopped rank goes on.
    """

    signal: int | None
    all_ranks: bool = False
    pause: float | None = None


KINDS = {
    "kill": Kind(signal.SIGKILL),
    "hang": Kind(signal.SIGSTOP),
    "pause": Kind(signal.SIGSTOP, pause=1.5),
    "SIGTERM to one": Kind(signal.SIGTERM),
    "SIGTERM to all": Kind(signal.SIGTERM, all_ranks=True),
    "SIGUSR1 to one": Kind(signal.SIGUSR1),
    "link cut": Kind(None),
}


class Verdict(NamedTuple):
    """``survived``, ``lost``, ``hung``, or ``too late`` where the run ended before the fault; and why."""

    word: str
    why: str = ""


def job_flags(folder: Path, engine: str, output: Path) -> dict[str, object]:
    """train.py's flags for a run of STEPS steps with accumulation, evaluations and saves."""
    flags = {
        **train_flags(folder, output),
        "eval_file": folder / "train.json",
        "max_steps": STEPS,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "eval_strategy": "steps",
        "eval_steps": SAVE_STEPS,
        "heartbeat_timeout": HEARTBEAT_SECONDS,
        "resume_from_checkpoint": "auto",
    }
    if engine.startswith("zero"):
        return flags | {"deepspeed": LAUNCH.parent / "configs" / "deepspeed" / f"{engine}.json"}
    return flags | {"engine": engine}


def run_undisturbed(fleet: Fleet, folder: Path, engine: str, output: Path) -> bytes:
    """The final blocks of a run that nobody hurts."""
    outcome = fleet.run(job_flags(folder, engine, output), output / "launch")
    assert not any(outcome.codes.values()), outcome.described()
    return (output / BLOCKS).read_bytes()


def judge_end(kind: str, fault: Fault, outcome: Outcome) -> Verdict:
    """Whether the hurt run ended as promised."""
    hurt = set(outcome.struck) if kind != "link cut" else set()
    others = {rank: code for rank, code in outcome.codes.items() if rank not in hurt}
    hanging = [rank for rank, code in outcome.codes.items() if code is None and (kind != "hang" or rank not in hurt)]
    if hanging:
        return Verdict("hung", f"ranks {hanging} didn't end in {LIMIT:g} s")
    if not outcome.struck:
        return Verdict("too late")
    late = [rank for rank, seconds in outcome.seconds.items() if seconds > LIMIT and rank in others]
    if late and kind in ("kill", "hang", "link cut"):
        return Verdict("hung", f"ranks {late} took more than {LIMIT:g} s")
    if kind == "pause":
        failed = any(outcome.codes.values())
        return Verdict("lost", "a pause ended the run") if failed else Verdict("survived")
    if kind in ("kill", "hang", "link cut"):
        return _judge_dead(outcome, others, hurt)
    return _judge_asked(fault, outcome)


def _judge_dead(outcome: Outcome, others: dict[int, int | None], hurt: set[int]) -> Verdict:
    done = outcome.activities[0][-1][1].startswith(f"evaluation after step {STEPS}")
    if not all(others.values()) and not done:  # after the last save nothing is left that a rank could be missed in
        return Verdict("lost", f"ranks ended with {others} although one was gone")
    silent = [rank for rank in others if not re.search(r"error: rank \d ends, in: .*rank \d", outcome.outputs[rank])]
    if silent and not done:
        return Verdict("lost", f"ranks {silent} don't say which rank is gone: {sorted(hurt)}")
    return Verdict("survived")


def _judge_asked(fault: Fault, outcome: Outcome) -> Verdict:
    """After SIGTERM or SIGUSR1: all ranks end alike, with 0 if everything done is saved."""
    codes, nothing_saved = set(outcome.codes.values()), 128 + fault.signal
    early = any(activity in BEFORE_TRAINING for activity in outcome.struck.values())
    # Between "preparing to train" and the first step the ranks agree; a signal may come on either side.
    allowed = ({nothing_saved}, {0}) if early else ({0},)
    return Verdict("survived") if codes in allowed else Verdict("lost", f"exit codes {outcome.codes}")


def judge_relaunch(before: Outcome, newest: int, relaunch: Outcome, output: Path, expected: bytes) -> Verdict:
    """Whether the relaunch went on from the last checkpoint and ended as if nothing had happened.

    Args:
        before: the hurt run.
        newest: the step of the newest complete checkpoint that it left.
        relaunch: what came of it.
        output: both runs' folder.
        expected: the undisturbed run's blocks.
    """
    if None in relaunch.codes.values():
        return Verdict("hung", f"the relaunch: {relaunch.codes}")
    if any(relaunch.codes.values()):
        return Verdict("lost", f"the relaunch ended with {relaunch.codes}")
    if newest < (saved := last_saved(before)):
        return Verdict("lost", f"checkpoint {saved} was there and is gone; the newest is {newest}")
    if relaunch.first_step() != (newest + 1 if newest < STEPS else 0):
        return Verdict("lost", f"the relaunch began with step {relaunch.first_step()}, not after {newest}")
    if (output / BLOCKS).read_bytes() != expected:
        return Verdict("lost", "the blocks differ from the undisturbed run's")
    return Verdict("survived")


def last_saved(outcome: Outcome) -> int:
    """The last step that rank 0 had saved when the run ended: it began something else afterwards."""
    activities = [activity for _, activity in outcome.activities[0]]
    done = [activity for activity, after in pairwise(activities) if after != activity]
    steps = [int(activity.rpartition(" ")[2]) for activity in done if activity.startswith("saving step ")]
    return max(steps, default=0)


def relaunch_and_judge(
    fleet: Fleet, folder: Path, engine: str, output: Path, before: Outcome, expected: bytes
) -> tuple[Outcome, Verdict]:
    """Start the same command once more."""
    newest = newest_checkpoint(output)
    relaunch = fleet.run(job_flags(folder, engine, output), output / "relaunch")
    return relaunch, judge_relaunch(before, newest, relaunch, output, expected)
