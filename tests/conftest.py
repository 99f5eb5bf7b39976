"""Fixtures that several files share."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import compiled_ops
import pytest
from architectures import make_model
from programs import CONFIG, LAUNCH, QUESTIONS, ROWS, Outcome, command_line, load_program, train_flags
from tiny_models import save_tiny_llama
from tiny_tokenizer import make_tokenizer

from smt_dist.cli.program import run_program


@pytest.fixture(scope="session", autouse=True)
def _ops(request) -> None:
    """Not in a test's time limit: it takes a minute on the first run in a checkout."""
    compiled_ops.build(request.config.cache.mkdir("torch_extensions"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup():
    """Before a test's fixtures, which launch processes too."""
    compiled_ops.remove_locks()
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
