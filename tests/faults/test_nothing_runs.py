"""Files are data: pickles beside them are never opened, code in a model folder is never run, no secret is written."""

from __future__ import annotations

import json
import pickle
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from programs import QUESTIONS, write_json

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
PICKLES = (
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "rng_state_0.pth"),
    *("pytorch_model.bin", "adapter_model.bin", "optimizer.bin", "user_content.pt"),
)
SECRETS = {"HF_TOKEN": "hf_SeCrEt0001", "WANDB_API_KEY": "SeCrEt0002", "AWS_SECRET_ACCESS_KEY": "SeCrEt0003"}


class Poison:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def poison(folder: Path, mark: Path) -> None:
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(Poison(mark)))


@pytest.fixture
def opened_pickles(monkeypatch):
    """What is unpickled from a file; whatever reads one goes through these."""
    calls = []

    def recorded(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    for owner, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "dump"), (torch.jit, "load")):
        monkeypatch.setattr(owner, name, recorded(f"{owner.__name__}.{name}", getattr(owner, name)))
    return calls


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def test_whole_run_opens_no_pickle_and_writes_no_secret_or_path(train, run, folder, tmp_path, opened_pickles, secrets):  # noqa: ARG001
    """Train, resume, continue, merge and evaluate, with poison in every folder that is read."""
    mark, model, out = tmp_path / "mark", tmp_path / "model", tmp_path / "out"
    pickle.loads(pickle.dumps(Poison(mark)))
    assert mark.exists(), "the poison has to work"
    mark.unlink()
    shutil.copytree(folder / "model", model)
    poison(model, mark)
    rows = write_json(tmp_path / "rows.json", [{"instruction": "add", "output": "1"}] * 4)
    flags = {"model_name_or_path": model, "eval_file": rows, "metric_for_best_model": "loss", **SAVING}
    texts = []

    def ended_well(outcome) -> None:
        assert outcome.code == 0, outcome.err
        texts.append(outcome.out + outcome.err)

    ended_well(train(**flags, output_dir=out, selection_report=True))
    for checkpoint in (out, out / "checkpoint-2", out / "checkpoint-4"):
        poison(checkpoint, mark)
    flags["max_steps"] = 6
    ended_well(train(**flags, output_dir=out, resume_from_checkpoint="auto"))
    ended_well(train(**{**flags, "output_dir": tmp_path / "on"}, adapter=out))
    ended_well(run("merge_adapter.py", model_name_or_path=model, adapter=out, output_dir=tmp_path / "merged"))
    questions = write_json(tmp_path / "questions.json", QUESTIONS)
    evaluation = {"eval_file": questions, "output": tmp_path / "results.json", "max_new_tokens": 2}
    ended_well(run("evaluate_model.py", model_name_or_path=model, adapter=out, **evaluation))
    assert not mark.exists()
    assert opened_pickles == []
    written = [path for place in (out, tmp_path / "on", tmp_path / "merged") for path in place.rglob("*")]
    for path in (path for path in written if path.is_file() and path.name not in PICKLES):
        content = path.read_bytes()
        assert str(tmp_path).encode() not in content, path
        assert socket.gethostname().encode() not in content or len(socket.gethostname()) < 6, path
        assert not any(secret.encode() in content for secret in SECRETS.values()), path
    assert not any(secret in text for secret in SECRETS.values() for text in texts)
    assert len(written) > 40


def test_model_with_pickled_weights_only_is_refused(train, run, folder, tmp_path):
    """torch.load has had holes even with weights_only; converting is one command, in an isolated environment."""
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(folder / "model", model)
    (model / "model.safetensors").unlink()
    poison(model, mark)
    assert "pickled weights (pytorch_model.bin) aren't read" in train(model_name_or_path=model).error
    evaluation = {"model_name_or_path": model, "eval_file": folder / "eval.json", "output": tmp_path / "r.json"}
    assert "pickled weights" in run("evaluate_model.py", **evaluation).error
    assert not mark.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_code_that_a_config_names_is_not_fetched(train, folder, tmp_path, key):
    """transformers takes a repository there, downloads a kernel and runs it, whatever --trust_remote_code says."""
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    write_json(model / "config.json", json.loads((model / "config.json").read_text()) | {key: "evil/kernels"})
    assert "asks for the attention code of 'evil/kernels'" in train(model_name_or_path=model).error


@pytest.mark.parametrize("program", ["train.py", "select_blocks.py", "merge_adapter.py", "evaluate_model.py"])
def test_code_in_a_model_folder_is_not_run(train, run, folder, tmp_path, monkeypatch, program):
    """transformers would ask at the terminal, and wait; with --trust_remote_code (train.py only) it runs."""
    model, mark = tmp_path / "model", tmp_path / "mark"
    shutil.copytree(folder / "model", model)
    code = "from transformers import LlamaConfig\nfrom pathlib import Path\n"
    code += f"Path({str(mark)!r}).touch()\nclass Own(LlamaConfig):\n    model_type = 'own'\n"
    (model / "own.py").write_text(code)
    config = json.loads((model / "config.json").read_text())
    write_json(model / "config.json", {**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Own"}})
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the terminal"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    if program in ("train.py", "select_blocks.py"):
        error = train(program=program, model_name_or_path=model).error
    elif program == "merge_adapter.py":
        assert train(max_steps=1).code == 0
        error = run(program, model_name_or_path=model, adapter=tmp_path / "out", output_dir=tmp_path / "merged").error
    else:
        error = run(program, model_name_or_path=model, eval_file=folder / "eval.json", output=tmp_path / "r").error
    assert "custom code" in error
    assert not mark.exists()
    assert "own" not in {name.rpartition(".")[2] for name in sys.modules}
