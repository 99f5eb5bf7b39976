"""``accelerate launch launch/train.py`` runs the engine that is asked for, and refuses what it would quietly not do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import launch, rank_environment
from programs import LAUNCH, command_line, logged_losses, train_flags
from tiers import chosen, slow, slow_unless
from two_nodes import free_port

CONFIGS = LAUNCH.parent / "configs"
# Config file under configs/accelerate, and the flags that its head tells to add.
RUNS = {"ddp": [], "hsdp": ["--engine", "fsdp2", "--dp_replicate_size", "2"], "zero3": []}

ENGINES = {"ddp": "ddp", "hsdp": "fsdp2", "zero3": "deepspeed"}


def accelerate(folder: Path, output: Path, options: list[str], flags: list[str]) -> subprocess.CompletedProcess[str]:
    """Run train.py on two ranks of this machine, in the repository's folder, where the configs' paths lead from."""
    training = {**train_flags(folder, output), "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--num_processes", "2"),
        *("--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port()), *options),
        *(str(LAUNCH / "train.py"), *command_line(training), *flags),
    ]
    environment = rank_environment(0, 1)
    return subprocess.run(command, cwd=LAUNCH.parent, env=environment, capture_output=True, text=True, timeout=150)


def single_node(name: str) -> list[str]:
    """A config of two nodes, started on one."""
    return ["--config_file", str(CONFIGS / "accelerate" / f"{name}.yaml")]


@pytest.fixture(scope="module")
def ran(request, folder, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Config -> checkpoint folder and what was printed."""
    results = {}
    for name in dict.fromkeys(["ddp", *chosen(request, "name")]):
        flags, output = RUNS[name], tmp_path_factory.mktemp(name)
        done = accelerate(folder, output, single_node(name), flags)
        assert done.returncode == 0, done.stderr[-4000:]
        results[name] = output / "checkpoint-2", done.stdout + done.stderr
    return results


@pytest.mark.parametrize("name", slow_unless(RUNS, lambda name: name == "ddp"))
def test_each_config_trains_the_same_on_two_ranks(ran, name):
    """A launcher whose variables we read wrongly would start one rank, or another engine, without a word."""
    checkpoint, printed = ran[name]
    assert f"engine {ENGINES[name]}, 2 ranks" in printed
    assert len(list(checkpoint.glob("rng_state_*.json"))) == 2
    losses = logged_losses(checkpoint)
    assert len(losses) == 2
    assert losses == pytest.approx(logged_losses(ran["ddp"][0]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--use_fsdp", "--fsdp_version", "2"], "accelerate's FSDP plugin can't be used with SMT.*--engine fsdp2"),
        pytest.param(["--use_deepspeed", "--zero_stage", "2"], "needs deepspeed_config_file", marks=slow),
    ],
    ids=["fsdp", "deepspeed without a file"],
)
def test_plugin_that_would_do_something_else_is_refused_in_one_line(folder, tmp_path, options, reason):
    """The first would run plain DDP on CPU, as the next test shows; the second a config that nobody wrote."""
    done = accelerate(folder, tmp_path / "out", [*options, "--mixed_precision", "no"], [])
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("train.py: error:")]
    assert re.search(reason, line)
    assert not (tmp_path / "out").exists()


@slow
def test_the_refusal_is_needed(tmp_path, monkeypatch):
    """Without it: asked for FSDP on CPU, accelerate wraps in DDP. Once this fails, the refusal may be too strict."""
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert launch("workers.runs:wrapped_by_accelerate_fsdp", 2, tmp_path) == ["DistributedDataParallel"] * 2
    assert "ACCELERATE_USE_FSDP" not in os.environ
