"""Fixtures that several files share."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import compiled_ops
import pytest
import torch
from architectures import make_model
from beside import make_scheduler, starts_ranks
from harness import this_server
from programs import CONFIG, LAUNCH, QUESTIONS, ROWS, Outcome, command_line, load_program, train_flags
from tiny_models import save_tiny_llama
from tiny_tokenizer import make_tokenizer

from smt_dist.cli.program import run_program


def pytest_sessionstart(session: pytest.Session) -> None:
    """Give compiled ops a folder of this checkout, and each worker one thread."""
    os.environ["TORCH_EXTENSIONS_DIR"] = str(session.config.cache.mkdir("torch_extensions"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: object):
    """Let tests that stay in their process run beside those that start ranks."""
    return make_scheduler(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have the tests that start ranks begin at once, where others run beside them."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: not starts_ranks(item.path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item):
    """Prepare what ranks need, before a test's fixtures, which launch them too.

    The parent of the ranks compiles what isn't compiled yet. Not in other tests: a lock could then be that of a
    process which the other worker has started.
    """
    if starts_ranks(item.path):
        compiled_ops.remove_locks()
        this_server.start()
    return (yield)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A tiny Llama on disk, for the launches of one file."""
    return save_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, another of the same shape, data and configs."""
    folder = tmp_path_factory.mktemp("files")
    for name, seed in (("model", 0), ("other", 1)):
        make_model("llama", seed, vocab_size=264, max_position_embeddings=1024).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    (folder / "train.json").write_text(json.dumps(ROWS))
    (folder / "eval.json").write_text(json.dumps(QUESTIONS))
    (folder / "smt.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a program's main in this process, as ``run(program, flag=value, ...)``; None leaves a flag out."""

    def run_it(program: str, *extra: str, **flags: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", [str(LAUNCH / program), *command_line(flags), *extra])
        capfd.readouterr()
        code = 0
        try:
            run_program(load_program(program).main)
        except SystemExit as stopped:
            code = stopped.code or 0
        return Outcome(code, *capfd.readouterr())

    yield run_it
    logging.getLogger("smt_dist").setLevel(logging.NOTSET)


@pytest.fixture
def train(run, folder, tmp_path):
    """``run`` for train.py with files that are right, apart from what is given."""

    def train_it(*extra: str, program: str = "train.py", **flags: object) -> Outcome:
        return run(program, *extra, **{**train_flags(folder, tmp_path / "out"), **flags})

    return train_it
