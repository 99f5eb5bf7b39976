"""The console commands and the wrappers in launch/ start the same programs, under launchers too."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from programs import Outcome, load_program

import smt_dist
from smt_dist.cli import benchmarks

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    "smt-train": ("smt_dist.cli.train", "train.py"),
    "smt-select": ("smt_dist.cli.select", "select_blocks.py"),
    "smt-merge": ("smt_dist.cli.merge", "merge_adapter.py"),
    "smt-evaluate": ("smt_dist.cli.evaluate", "evaluate_model.py"),
    "smt-plan": ("smt_dist.cli.plan", "profile_memory.py"),
}


@pytest.fixture
def start(monkeypatch, capfd):
    """Runs a console command in this process, as the script that pip writes for it does."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]

    def start_it(command: str, *words: str) -> Outcome:
        module, _, function = scripts[command].partition(":")
        monkeypatch.setattr(sys, "argv", [f"bin/{command}", *words])
        with pytest.raises(SystemExit) as stopped:
            getattr(importlib.import_module(module), function)()
        return Outcome(stopped.value.code or 0, *capfd.readouterr())

    return start_it


@pytest.mark.parametrize("command", PROGRAMS)
def test_a_command_is_the_program_that_its_wrapper_starts(start, command):
    """Two programs that differ would be two sets of flags."""
    module, wrapper = PROGRAMS[command]
    main = importlib.import_module(module).main
    assert load_program(wrapper).main is main
    outcome = start(command, "--help")
    assert outcome.code == 0
    assert f"usage: {command} " in outcome.out
    text = " ".join(outcome.out.split())
    assert f"{command} " in text.partition("options:")[0].partition("[-h]")[2], "the description names the command"
    assert f"launch/{wrapper}" in text


@pytest.mark.parametrize("command", [*PROGRAMS, "smt-compare"])
def test_a_command_ends_a_bad_flag_in_one_line(start, command):
    """What a console script returns is its exit code: a caught error must not become a 0."""
    assert f"{command}: error: " in start(command, "--no_such_flag").error


def test_comparing_without_the_benchmarks_says_where_they_are(start, monkeypatch, tmp_path):
    """A wheel has none."""
    monkeypatch.setattr(benchmarks, "FOLDER", tmp_path)
    assert "python launch/benchmarks/compare.py" in start("smt-compare", "--help").error


def test_torchrun_starts_a_program_by_its_module(tmp_path):
    """cli/select.py has the name of a module of Python's that subprocess needs: it may never stand in its place."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    command += ["-m", "smt_dist.cli.select", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "smt-select --smt_config" in done.stdout


@pytest.mark.parametrize("command", ["merge", "evaluate", "plan"])
def test_help_and_bad_flags_do_not_wait_for_torch(command):
    """Five seconds for a look at the flags, of which a mistyped one costs as many."""
    code = (
        f"import sys; sys.argv = ['smt-{command}', '--help']\n"
        f"from smt_dist.cli.commands import {command}\n"
        f"try:\n    {command}()\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0, finished.stderr
    assert "usage: " in finished.stdout


def test_the_face_has_every_name_that_it_exports():
    """Names are imported when they are asked for: one that moved would be missed by its user first."""
    assert set(smt_dist.__all__) <= set(dir(smt_dist))
    for name in smt_dist.__all__:
        assert getattr(smt_dist, name).__module__.startswith("smt_dist.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = smt_dist.nothing


@pytest.mark.parametrize("name", ["benchmark.py", "compare.py", "capacity.py", "capacity.sh"])
def test_an_old_path_names_the_new_one(name):
    """Scripts that measure this project are started by path."""
    program = "bash" if name.endswith(".sh") else sys.executable
    done = subprocess.run([program, str(ROOT / "launch" / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert (ROOT / line.partition(" is now ")[2].split()[0]).is_file()
