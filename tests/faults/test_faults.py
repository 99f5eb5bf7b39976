"""A quick sample of ``campaign.py``: each rank on a node of its own where namespaces can be made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import TIMEOUT, rank_environment
from programs import LAUNCH, command_line, write_job_files
from tiers import chosen, slow, slow_rows_unless
from two_nodes import Nodes, two_nodes

from faults.campaign import cutter
from faults.fleet import Fault, Fleet, newest_checkpoint
from faults.judge import BLOCKS, ENGINES, job_flags, judge_end, relaunch_and_judge, run_undisturbed

# Engine, kind, activity, delay; drawn once, so that each engine and each kind has its turn.
SAMPLE = [
    ("ddp", "kill", "warm-up", 0.0),
    ("ddp", "hang", "training, step 5: backward", 0.05),
    ("ddp", "SIGTERM to one", "evaluation after step 2", 0.0),
    ("fsdp2", "kill", "saving step 4", 0.02),
    ("fsdp2", "SIGUSR1 to one", "training, step 3: forward", 0.0),
    ("zero2", "kill", "training, step 3: optimizer step", 0.0),
    ("zero3", "kill", "training, step 5: backward", 0.03),
    ("zero3", "SIGTERM to all", "training, step 1: backward", 0.0),
]
QUICK = [SAMPLE[0], SAMPLE[1], SAMPLE[6]]
SIGNALS = {"kill": 9, "hang": 19, "SIGTERM to one": 15, "SIGTERM to all": 15, "SIGUSR1 to one": 10}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def fleet(nodes) -> Iterator[Fleet]:
    with Fleet(nodes.both()) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_job_files(tmp_path_factory.mktemp("job"))


@pytest.fixture(scope="module")
def undisturbed(request, fleet, files, tmp_path_factory) -> dict[str, bytes]:
    """Engine -> the blocks of a run that nobody hurts."""
    folder, asked = tmp_path_factory.mktemp("undisturbed"), {"ddp", *chosen(request, "engine")}
    return {e: run_undisturbed(fleet, files, e, folder / e) for e in ENGINES if e in asked}


@pytest.mark.parametrize(
    ("engine", "kind", "activity", "delay"), slow_rows_unless(SAMPLE, lambda *case: case in QUICK), ids=str
)
def test_hurt_run_ends_in_time_and_its_relaunch_ends_as_if_nothing_had_happened(
    fleet, files, undisturbed, tmp_path, engine, kind, activity, delay
):
    """A rank that is left waiting, a checkpoint that is no good, or a step that is done twice or not at all."""
    fault = Fault(SIGNALS[kind], (0, 1) if kind.endswith("all") else (1,), activity, delay)
    # A rank that hangs is killed at last, when the others must have ended for long.
    outcome = fleet.run(job_flags(files, engine, tmp_path), tmp_path / "launch", fault, limit=15)
    assert judge_end(kind, fault, outcome).word == "survived", outcome.described()
    assert set(outcome.struck) == set(fault.ranks), "the fault came too late to show anything"
    assert (outcome.codes[1] == -signal.SIGKILL) == (kind == "kill")
    relaunch, verdict = relaunch_and_judge(fleet, files, engine, tmp_path, outcome, undisturbed[engine])
    assert verdict.word == "survived", f"{verdict.why}\n{relaunch.described()}"


def test_rank_zero_is_missed_too(fleet, files, tmp_path):
    """The others' heartbeats go to it: who watches the watchman?"""
    fault = Fault(signal.SIGKILL, (0,), "training, step 1: forward")
    outcome = fleet.run(job_flags(files, "ddp", tmp_path), tmp_path, fault)
    assert outcome.codes == {0: -signal.SIGKILL, 1: 75}, outcome.described()
    assert "rank 1 ends, in: training, step 1" in outcome.outputs[1]
    assert "rank 0 is gone" in outcome.outputs[1]


@slow
def test_without_a_heartbeat_nobody_misses_a_rank_that_hangs(fleet, files, tmp_path):
    """Shows the fault that the heartbeat is there for: PyTorch's own time-out is half an hour."""
    flags = job_flags(files, "ddp", tmp_path) | {"heartbeat_timeout": 0}
    fault = Fault(signal.SIGSTOP, (1,), "training, step 3: forward")
    outcome = fleet.run(flags, tmp_path, fault, limit=12)
    assert outcome.struck
    assert outcome.codes[0] is None, outcome.described()


@slow
def test_main_thread_that_hangs_is_missed_by_collectives(fleet, files, tmp_path):
    """It still has a heartbeat. Trainer hands --ddp_timeout on for GPUs only, and DeepSpeed's group had PyTorch's
    default of half an hour.
    """
    flags = job_flags(files, "zero2", tmp_path) | {"ddp_timeout": 5}
    fault = Fault(signal.SIGUSR2, (1,), "training, step 3: forward")
    outcome = fleet.run(flags, tmp_path, fault)
    assert None not in outcome.codes.values(), outcome.described()
    assert all(outcome.codes.values()), outcome.described()
    assert "5000ms" in outcome.outputs[0]
    assert "rank 0 failed: RuntimeError" in outcome.outputs[1]


def test_asked_to_end_before_training_says_that_there_is_nothing_to_save(fleet, files, tmp_path):
    """Exit code 0 would promise a checkpoint; a traceback would look like a fault."""
    fault = Fault(signal.SIGTERM, (1,), "load")
    outcome = fleet.run(job_flags(files, "ddp", tmp_path), tmp_path, fault)
    assert outcome.codes == {0: 143, 1: 143}, outcome.described()
    for output in outcome.outputs.values():
        assert "was asked to end (SIGTERM)" in output
        assert "nothing to save" in output
        assert "Traceback" not in output


def test_finished_run_is_not_trained_further_when_it_is_started_again(fleet, files, undisturbed, tmp_path):
    """Ended between its last checkpoint and its adapter, it did one step too many, with a rate of zero or not."""
    for launch in ("first", "again"):
        outcome = fleet.run(job_flags(files, "ddp", tmp_path), tmp_path / launch)
        assert outcome.codes == {0: 0, 1: 0}, outcome.described()
    assert outcome.first_step() == 0
    assert (tmp_path / BLOCKS).read_bytes() == undisturbed["ddp"]


@slow
def test_cut_link_ends_both_sides_and_the_relaunch_goes_on(fleet, nodes, files, undisturbed, tmp_path):
    """Packets vanish and no connection closes: without a time-out both sides would wait for the other's gradients."""
    if not nodes.real:
        pytest.skip(f"there is no link: {nodes.problem}")
    fault = Fault(0, (), "training, step 3: forward")
    try:
        outcome = fleet.run(job_flags(files, "ddp", tmp_path), tmp_path / "launch", meanwhile=cutter(nodes, fault))
    finally:
        nodes.second.mend()
    assert outcome.codes == {0: 75, 1: 75}, outcome.described()
    for rank, other in ((0, 1), (1, 0)):
        assert f"rank {other} has said nothing for 10 s" in outcome.outputs[rank]
    assert newest_checkpoint(tmp_path) == 2
    _, verdict = relaunch_and_judge(fleet, files, "ddp", tmp_path, outcome, undisturbed["ddp"])
    assert verdict.word == "survived", verdict.why


@slow
def test_torchrun_restarts_a_killed_rank_and_ends_as_if_nothing_had_happened(fleet, files, tmp_path):
    """The restart must find the newest checkpoint, and nothing of the first try may be in its way."""
    steps = {"max_steps": 60, "save_steps": 10, "eval_strategy": "no", "eval_steps": None}
    whole = fleet.run(job_flags(files, "ddp", tmp_path / "whole") | steps, tmp_path / "launch")
    assert whole.codes == {0: 0, 1: 0}, whole.described()
    output = tmp_path / "hurt"
    # With a store for each try: otherwise the second hangs now and then, as it reads what the first one wrote.
    environment = rank_environment(0, 1) | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    launcher = ["torchrun", "--standalone", "--local_addr", "127.0.0.1", "--nproc_per_node", "2", "--max-restarts", "1"]
    command = [*launcher, str(LAUNCH / "train.py"), *command_line(job_flags(files, "ddp", output) | steps)]
    with open(tmp_path / "output.txt", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _kill_a_rank_once(process, output, "checkpoint-10")
        code = process.wait(TIMEOUT)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
    said = (tmp_path / "output.txt").read_text(errors="replace")
    assert code == 0, said[-4000:]
    assert "may read addresses of those that are gone" not in said
    assert (output / BLOCKS).read_bytes() == (tmp_path / "whole" / BLOCKS).read_bytes()
    state = json.loads((output / "checkpoint-60" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == list(range(1, 61))


def _kill_a_rank_once(launcher: subprocess.Popen, output: Path, checkpoint: str) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not (output / checkpoint / "trainer_state.json").exists():
        assert launcher.poll() is None, "it ended before it could be hurt"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = [child for child in psutil.Process(launcher.pid).children() if "train.py" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
