"""The wheel works alone: installed where there is no repository, its commands start and train."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from programs import Outcome, command_line, train_flags, write_job_files
from tiers import slow

ROOT = Path(__file__).parents[1]
COMMANDS = ("smt-train", "smt-select", "smt-merge", "smt-evaluate", "smt-plan")
NOT_SOURCES = (".*", "__pycache__", "*.egg-info", "build", "outputs")


class Installed(NamedTuple):
    """A wheel, and where it is installed."""

    wheel: Path
    folder: Path
    run: Callable[..., Outcome]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Iterator[Installed]:
    """The wheel in an environment that has the packages of this one, but neither the repository nor its path."""
    folder = tmp_path_factory.mktemp("wheel")
    # setuptools leaves build/ in the tree that it builds from, and takes what lies there for sources.
    shutil.copytree(ROOT, folder / "tree", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    pip(sys.executable, folder, "wheel", "--no-deps", "--no-build-isolation", "./tree")
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(folder / "tree")

    venv.create(folder / "venv", symlinks=True)
    (site_packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # A path file inside the folders that this one names isn't read: an editable install there stays unseen.
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site_packages / "shared.pth").write_text("\n".join(shared))
    python = str(folder / "venv/bin/python")
    pip(python, folder, "install", "--no-index", "--no-deps", "--ignore-installed", str(wheel))
    (folder / "empty").mkdir()

    def run(command: str, *words: str) -> Outcome:
        return start([str(folder / "venv/bin" / command), *words], folder / "empty")

    yield Installed(wheel, folder, run)
    shutil.rmtree(folder)


def start(command: list[str], folder: Path) -> Outcome:
    """Run a command without the path that would lead it to the repository."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


def pip(python: str, folder: Path, *words: str) -> None:
    """Run this environment's pip for an interpreter that may have none."""
    outcome = start([sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", *words], folder)
    assert outcome.code == 0, outcome.out + outcome.err


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    """A room without ``__init__.py``, or a page that isn't package data, is missed when it is first used."""
    with zipfile.ZipFile(installed.wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = (path for path in (ROOT / "smt_dist").rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert names == {str(path.relative_to(ROOT)) for path in sources}
    assert {"smt_dist/py.typed", "smt_dist/memory/record/report.html"} <= names


def test_its_commands_start_from_an_empty_folder(installed):
    """Something imported from launch/ or tests/ would show here only."""
    found = installed.run("python", "-c", "import importlib.util as u; print(u.find_spec('smt_dist').origin)")
    assert Path(found.out.strip()).is_relative_to(installed.folder / "venv"), found
    with ThreadPoolExecutor(2) as pool:
        outcomes = dict(zip(COMMANDS, pool.map(lambda name: installed.run(name, "--help"), COMMANDS), strict=True))
    for name, outcome in outcomes.items():
        assert outcome.code == 0, outcome.err
        assert outcome.out.startswith(f"usage: {name} ")


def test_what_only_a_checkout_has_says_so(installed):
    """And not in a traceback."""
    comparing = installed.run("smt-compare", "--task", "math")
    assert "smt-compare: error: the benchmarks aren't part of the wheel" in comparing.error
    assert len(comparing.err.splitlines()) == 1


@slow
def test_it_trains(installed, tmp_path):
    """The main job, from files to an adapter."""
    flags = train_flags(write_job_files(tmp_path), tmp_path / "out")
    trained = installed.run("smt-train", *command_line(flags))
    assert trained.code == 0, trained.err
    assert (tmp_path / "out/smt_blocks.safetensors").is_file()
