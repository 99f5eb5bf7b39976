"""The programs as a user runs them, from files to files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from architectures import logits_of
from programs import (
    CONFIG,
    QUESTIONS,
    ROWS,
    logged_losses,
    write_config,
)
from safetensors.torch import load_file
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

import smt_dist
from smt_dist.engines.ddp import DDPEngine
from smt_dist.errors import SMTError
from smt_dist.selection import select
from smt_dist.training import run_plan, trainer


def adapted_logits(folder: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    smt_dist.load_adapter(model, adapter)
    return logits_of(model)


def test_training_makes_an_adapter_that_evaluation_reads(train, run, folder, tmp_path, caplog):
    """The main job, from files to files: the blocks moved, the adapter fits its base and is scored."""
    trained = train(eval_file=folder / "train.json")
    assert trained.code == 0, trained.err
    assert f"adapter saved in {tmp_path / 'out'}" in trained.out
    assert "SMT trains 6 blocks in" in caplog.text
    assert "optimizer state: 4,608 bytes a rank" in caplog.text
    deltas = load_file(tmp_path / "out/smt_blocks.safetensors")
    assert sum(delta.numel() for delta in deltas.values()) == 6 * 64
    assert all(delta.abs().max() > 0 for delta in deltas.values())
    assert not list((tmp_path / "out").glob("model*")), "the base was saved along"

    scores = {}
    for adapter in (None, tmp_path / "out"):
        flags = {"model_name_or_path": folder / "model", "adapter": adapter, "eval_file": folder / "eval.json"}
        outcome = run("evaluate_model.py", output=tmp_path / "r.json", max_new_tokens=4, dtype="float32", **flags)
        assert outcome.code == 0, outcome.err
        scores[adapter] = json.loads((tmp_path / "r.json").read_text())
    assert all(result["n"] == len(QUESTIONS) for result in scores.values())
    generations = [[p["generation"] for p in result["results"][0]["predictions"]] for result in scores.values()]
    assert generations[0] != generations[1], "the adapter changed no answer"


def test_a_resumed_run_ends_where_an_unbroken_one_ends(train, tmp_path):
    """Blocks, moments, schedule and data order: bit for bit, or a long run is worth less after each break."""
    flags = {"save_strategy": "steps", "save_steps": 2}
    assert train(output_dir=tmp_path / "whole", **flags).code == 0
    broken = tmp_path / "broken"
    assert train(output_dir=broken, resume_from_checkpoint="auto", **flags).code == 0, "auto without a checkpoint"
    for name in ("checkpoint-4", "smt_blocks.safetensors"):
        path = broken / name
        subprocess.run(["rm", "-r", str(path)], check=True)
    resumed = train(output_dir=broken, resume_from_checkpoint="auto", **flags)
    assert resumed.code == 0, resumed.err
    names = ["smt_blocks.safetensors", "smt_selection.json", "checkpoint-4/smt_blocks.safetensors"]
    for name in [*names, "smt_config.json"]:
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert logged_losses(broken / "checkpoint-4") == logged_losses(tmp_path / "whole/checkpoint-4")
    files = {path.name for path in (broken / "checkpoint-4").iterdir()}
    assert not {name for name in files if name.startswith(("model", "optimizer.", "pytorch_model"))}


@pytest.mark.parametrize("how", ["fresh", "resumed", "with a selection"])
def test_a_run_makes_one_engine_and_compares_its_selection_once(train, tmp_path, monkeypatch, how):
    """What one step of a run has found out, the next is told."""
    flags = {"save_strategy": "steps", "save_steps": 2}
    if how != "fresh":
        assert train(max_steps=2, **flags).code == 0
    flags |= {
        "fresh": {},
        "resumed": {"resume_from_checkpoint": "auto"},
        "with a selection": {"selection": tmp_path / "out/smt_selection.json", "output_dir": tmp_path / "other"},
    }[how]
    engines: list[str] = []
    make = DDPEngine.__init__
    monkeypatch.setattr(DDPEngine, "__init__", lambda self, *args: engines.append("ddp") or make(self, *args))
    compared: list[str] = []
    for module in (select, run_plan, trainer):
        monkeypatch.setattr(module, "assert_same_on_all_ranks", lambda _, what: compared.append(what))
    assert train(**flags).code == 0
    assert engines == ["ddp"]
    assert compared == ["the block selection"]


def test_a_resumed_run_keeps_the_config_of_its_checkpoint(train, tmp_path):
    """Defaults, or an edited file, would change learning rates and what the adapter says of itself."""
    group = {**CONFIG["groups"][0], "lr_multiplier": 0.5}
    flags = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto"}
    assert train(smt_config=write_config(tmp_path, groups=[group]), max_steps=2, **flags).code == 0
    refused = train(**flags).error
    assert "--smt_config" in refused
    assert "groups[0].lr_multiplier is 1.0, was 0.5" in refused
    resumed = train(smt_config=None, **flags)
    assert resumed.code == 0, resumed.err
    assert json.loads((tmp_path / "out/smt_config.json").read_text())["groups"] == [group]


def test_an_adapter_that_is_continued_starts_from_its_blocks(train, folder, tmp_path):
    """Zeroed or rounded blocks would show in the loss of the first step."""
    best_anywhere = write_config(tmp_path, selection={"strategy": "no_restriction"})  # they train fastest here
    assert train(output_dir=tmp_path / "first", smt_config=best_anywhere).code == 0
    same_rows = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "per_device_train_batch_size": len(ROWS)}
    outcome = train(adapter=tmp_path / "first", smt_config=None, output_dir=tmp_path / "second", **same_rows)
    assert outcome.code == 0, outcome.err
    fresh = train(selection=tmp_path / "first/smt_selection.json", output_dir=tmp_path / "third", **same_rows)
    assert fresh.code == 0, fresh.err

    from smt_dist.data.dataset import CausalLMCollator, build_dataset
    from smt_dist.data.rows import read_rows

    dataset, _ = build_dataset(read_rows(folder / "train.json"), make_tokenizer(), max_seq_length=1024)
    batch = CausalLMCollator(0)(list(dataset))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    base_loss = model(**batch).loss.item()
    smt_dist.load_adapter(model, tmp_path / "first")
    adapted_loss = model(**batch).loss.item()
    assert logged_losses(tmp_path / "second/checkpoint-1")[0] == pytest.approx(adapted_loss, rel=1e-4)
    assert logged_losses(tmp_path / "third/checkpoint-1")[0] == pytest.approx(base_loss, rel=1e-4)
    assert adapted_loss < 0.98 * base_loss
    assert json.loads((tmp_path / "second/smt_config.json").read_text())["groups"][0]["blocks"] == 6


def test_a_selection_made_apart_is_the_one_that_training_would_make(train, tmp_path):
    """`select_blocks.py` and then `--selection` is the same run in two parts."""
    path = tmp_path / "chosen/selection.json"
    chosen = train("--output", str(path), program="select_blocks.py")
    assert chosen.code == 0, chosen.err
    assert "6 blocks of 8 x 8" in chosen.out
    assert train(output_dir=tmp_path / "a").code == 0
    assert train(output_dir=tmp_path / "b", selection=path).code == 0
    assert (tmp_path / "a/smt_selection.json").read_bytes() == path.read_bytes()
    assert (tmp_path / "b/smt_blocks.safetensors").read_bytes() == (tmp_path / "a/smt_blocks.safetensors").read_bytes()


def test_packed_training_runs_from_file_to_adapter(train, tmp_path, caplog):
    """Fewer, longer rows; the warm-up sees them too."""
    outcome = train("--packing", max_seq_length=512, per_device_train_batch_size=1)
    assert outcome.code == 0, outcome.err
    assert "16 rows -> 6 sequences" in caplog.text
    assert (tmp_path / "out/smt_blocks.safetensors").exists()


def test_a_full_ft_warm_up_ends_in_an_adapter_that_refuses_the_unmoved_base(train, folder, tmp_path):
    """Its blocks belong to the moved weights: on the original base they would be wrong, silently."""
    config = write_config(tmp_path, warmup={"steps": 2, "mode": "full_ft"})
    outcome = train(smt_config=config)
    assert outcome.code == 0, outcome.err
    assert "needs the moved base" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(SMTError, match="as its full fine-tuning warm-up moved it"):
        adapted_logits(folder, tmp_path / "out")


def test_a_merged_checkpoint_scores_as_base_and_adapter_do(train, run, folder, tmp_path):
    """The last step of the main job: what is shipped answers as what was trained."""
    assert train().code == 0
    base = {"model_name_or_path": folder / "model"}
    merged = run("merge_adapter.py", adapter=tmp_path / "out", output_dir=tmp_path / "merged", **base)
    assert merged.code == 0, merged.err
    assert "merged 384 parameters into" in merged.out
    answers = []
    for flags in ({**base, "adapter": tmp_path / "out"}, {"model_name_or_path": tmp_path / "merged"}):
        questions = {"eval_file": folder / "eval.json", "max_new_tokens": 4}
        outcome = run("evaluate_model.py", output=tmp_path / "r.json", **flags, **questions)
        assert outcome.code == 0, outcome.err
        answers.append(json.loads((tmp_path / "r.json").read_text())["results"][0]["predictions"])
    assert answers[0] == answers[1]
    error = run("merge_adapter.py", adapter=tmp_path / "out", output_dir=tmp_path / "merged", **base).error
    assert f"{tmp_path / 'merged'}: exists already" in error
    other = {"model_name_or_path": folder / "other", "adapter": tmp_path / "out", "output_dir": tmp_path / "wrong"}
    assert f"{tmp_path / 'out'}: trained on another base model" in run("merge_adapter.py", **other).error
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("program", ["train.py", "select_blocks.py", "evaluate_model.py", "merge_adapter.py"])
def test_help_shows_the_flags_with_their_defaults(run, program):
    """A stray % in a help text makes argparse fail just here."""
    outcome = run(program, "--help")
    assert outcome.code == 0, outcome.err
    text = " ".join(outcome.out.split())
    assert "--model_name_or_path" in text
    if program == "evaluate_model.py":
        assert "prompts generated together (default: 32)" in text
    elif program == "merge_adapter.py":
        assert "largest file of the result, GiB (default: 2.0)" in text
    else:
        assert "blocks' masters are fp32 (default: bfloat16)" in text
        assert "longer rows are cut, and counted (default: 1024)" in text
        assert "learning rate for the optimizer. (default: 5e-05)" in text
    assert "(default: None) (default" not in text
