"""Bad input to the programs ends in one clear line and exit code 2, on every rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from faults.fleet import Fleet
from programs import (
    LAUNCH,
    Outcome,
    command_line,
    train_flags,
    write_config,
    write_json,
)
from tiers import slow
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

import smt_dist


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"blok_size": 8}, "blok_size: unknown key"),
        ({"block_size": "8"}, "block_size"),
        ({"groups": [{"blocks": "6"}]}, "groups.0.blocks"),
        ({"groups": [{"target_modules": "atention", "blocks": 6}]}, "target_modules: 'atention' matches no linear"),
        ({"groups": [{"blocks": 10_000}]}, r"groups[attention].blocks: 10000 asks for 10000 blocks"),
        ({"groups": [{"fraction": 0.9}]}, "groups[attention].fraction: 0.9 asks for"),
        ({"groups": [{"fraction": 1e-6}]}, "groups[attention].fraction: 1e-06"),
        ({"block_size": 7}, "block_size: 7 x 7 doesn't divide model.layers.0.self_attn.q_proj (32 x 32); 16 fits"),
        ({"block_size": 256}, "16 fits every target"),
    ],
    ids=str,
)
def test_a_bad_config_ends_in_one_line(train, tmp_path, changes, named):
    """The line names the field, and the file where the fault is in the file alone."""
    assert named in train(smt_config=write_config(tmp_path, **changes)).error
    assert not (tmp_path / "out").exists()


def test_select_blocks_ends_in_the_same_line(train, tmp_path):
    """Both programs check alike: what one refuses, the other may not take."""
    for changes, named in (({"blok_size": 8}, "blok_size: unknown key"), ({"block_size": 7}, "block_size: 7 x 7")):
        assert named in train(program="select_blocks.py", smt_config=write_config(tmp_path, **changes)).error


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (None, "no such file"),
        ("", "the file is empty"),
        ("[]", "the list has no rows"),
        ('[{"instruction": "a"', "not JSON"),
        ('[{"instruction": "a", "output": "b"}, {"instruction": "a"}]', "row 2: field 'output' is missing"),
        ('[{"instruction": "a", "output": 3}]', "row 1: field 'output' must be a string"),
        ('{"text": "a"}\n{"text": \n', "line 2: not JSON"),
        ('[{"question": "a"}]', "row 1: has no field that says its format"),
    ],
)
def test_bad_data_ends_in_one_line_that_names_file_and_row(train, tmp_path, content, named):
    """In a file of a million rows only the row's number helps."""
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_text(content)
    error = train(train_file=path).error
    assert str(path) in error
    assert named in error


def test_bad_evaluation_rows_are_found_before_training(train, tmp_path):
    """Not after it, when the time is spent."""
    path = write_json(tmp_path / "eval.json", [{"instruction": "a"}])
    assert "eval.json, row 1" in train(eval_file=path).error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"model_name_or_path": None}, "--model_name_or_path"),
        ({"train_file": None}, "--train_file"),
        ({"dataset_name": "some/set"}, "--dataset_name"),
        ({"smt_config": "/nowhere/smt.json"}, "/nowhere/smt.json: No such file"),
        ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
        ({"selection": "/nowhere/selection.json"}, "/nowhere/selection.json: No such file"),
        ({"adapter": "/nowhere/adapter"}, "/nowhere/adapter: no such adapter folder"),
        ({"adapter": "a", "selection": "s"}, "--selection together with --adapter"),
        ({"resume_from_checkpoint": "/nowhere/checkpoint-2"}, "/nowhere/checkpoint-2"),
        ({"resume_from_checkpoint": "true"}, "--resume_from_checkpoint"),
        ({"prompt_style": "fancy"}, "--prompt_style: 'fancy'"),
        ({"prompt_style": "chat", "max_seq_length": 1}, "max_seq_length must be at least 2"),
        ({"max_seq_length": 8}, "max_seq_length=8"),
        ({"max_steps": "many"}, "--max_steps"),
        ({"no_such_flag": 3}, "--no_such_flag"),
        ({"model_name": "m"}, "--model_name"),
        ({"engine": "fsdp3"}, "--engine: 'fsdp3'"),
        ({"bf16": "true"}, "--bf16"),
        ({"optim": "adafactor"}, "--optim"),
        ({"eval_strategy": "steps", "eval_steps": 1}, "--eval_file"),
        ({"do_eval": "true"}, "--eval_file"),
        ({"do_predict": "true"}, "--do_predict"),
        ({"gguf_file": "/nowhere/model.gguf"}, "model.gguf"),
    ],
    ids=str,
)
def test_a_bad_flag_ends_in_one_line_that_names_it(train, flags, named):
    """A traceback of fifty lines hides the one that matters, and each rank prints its own."""
    assert named in train(**flags).error


def test_an_output_folder_that_is_a_file_ends_in_one_line(train, tmp_path):
    """Found before training: the adapter couldn't be saved after it."""
    (tmp_path / "out").write_text("")
    assert "--output_dir" in train().error


def test_a_selection_file_that_does_not_fit_ends_in_one_line(train, tmp_path):
    """A selection of another model, or one edited by hand."""
    name = "model.layers.0.self_attn.q_proj"
    for blocks, named in (({name: [[9, 0]]}, f"{name}: block (9, 0) lies outside"), ({"h.0.q": [[0, 0]]}, "h.0.q")):
        path = write_json(tmp_path / "selection.json", {"block_size": [8, 8], "blocks": blocks})
        assert named in train(selection=path).error
    path = write_json(tmp_path / "selection.json", {"block_size": [8, 8], "blocks": {name: [[0, 0], [0, 0]]}})
    assert f"{path}: blocks: {name} lists a block twice" in train(selection=path).error


def test_an_adapter_for_another_base_ends_in_one_line(train, run, folder, tmp_path):
    """For training on and for evaluation alike."""
    model = AutoModelForCausalLM.from_pretrained(folder / "other", dtype=torch.float32)
    smt_dist.apply_selection(
        model, smt_dist.BlockSelection(block_size=(8, 8), blocks={"model.layers.0.self_attn.q_proj": [(0, 0)]})
    )
    smt_dist.save_adapter(model, tmp_path / "foreign")
    assert "another base model (content fingerprint)" in train(adapter=tmp_path / "foreign").error
    flags = {"model_name_or_path": folder / "model", "eval_file": folder / "eval.json", "output": tmp_path / "r.json"}
    error = run("evaluate_model.py", adapter=tmp_path / "foreign", **flags).error
    assert f"{tmp_path / 'foreign'}: trained on another base model" in error
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("mode", ["scoring", "full_ft"])
def test_a_gradient_that_is_not_finite_ends_in_one_line_that_names_the_module(train, folder, tmp_path, mode):
    """Blocks ranked by NaN are an arbitrary choice."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.model.layers[1].self_attn.v_proj.weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    make_tokenizer().save_pretrained(tmp_path / "broken")
    config = write_config(tmp_path, warmup={"steps": 2, "mode": mode})
    error = train(model_name_or_path=tmp_path / "broken", smt_config=config).error
    assert "_proj is not finite" in error
    assert "warm-up" in error
    assert not (tmp_path / "out/smt_blocks.safetensors").exists()


@pytest.mark.parametrize("damage", ["config", "weights", "no tokenizer"])
def test_a_damaged_model_folder_ends_in_one_line_that_names_it(train, folder, tmp_path, damage):
    """A download that broke off is the commonest cause."""
    broken = tmp_path / "broken"
    subprocess.run(["cp", "-r", str(folder / "model"), str(broken)], check=True)
    if damage == "config":
        (broken / "config.json").write_text("{")
    elif damage == "weights":
        content = (broken / "model.safetensors").read_bytes()
        (broken / "model.safetensors").write_bytes(content[: len(content) // 2])
    else:
        for path in broken.glob("tokenizer*"):
            path.unlink()
    assert str(broken) in train(model_name_or_path=broken).error


def test_select_blocks_refuses_the_flags_that_are_not_its_own(train, tmp_path):
    """A selection given to the program that makes one would be ignored."""
    assert "belong to train.py" in train(program="select_blocks.py", selection=tmp_path / "s.json").error
    (tmp_path / "file").write_text("")
    error = train("--output", str(tmp_path / "file/selection.json"), program="select_blocks.py").error
    assert "--output" in error


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"eval_file": "/nowhere/eval.json"}, "/nowhere/eval.json: no such file"),
        ({"model_name_or_path": "/nowhere/model"}, "/nowhere/model"),
        ({"adapter": "/nowhere/adapter"}, "/nowhere/adapter: no such adapter folder"),
        ({"batch_size": 0}, "--batch_size"),
        ({"no_such_flag": 1}, "--no_such_flag"),
        ({"dtype": "int8"}, "--dtype"),
    ],
    ids=str,
)
def test_evaluation_refuses_bad_input_in_one_line(run, folder, tmp_path, flags, named):
    """As training does."""
    right = {"model_name_or_path": folder / "model", "eval_file": folder / "eval.json", "output": tmp_path / "r.json"}
    assert named in run("evaluate_model.py", **{**right, **flags}).error


# -- real processes ----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("fault", [pytest.param("config", marks=slow), "data"])
def test_two_ranks_with_bad_input_all_stop_and_print_one_line(folder, tmp_path, fault):
    """A rank that waits for one that has left hangs until the time-out, hours later on a real cluster."""
    flags = train_flags(folder, tmp_path / "out")
    if fault == "config":
        flags["smt_config"], named = write_config(tmp_path, blok_size=8), "blok_size: unknown key"
    else:
        flags["train_file"], named = write_json(tmp_path / "rows.json", [{"instruction": "a"}]), "row 1: field 'output'"
    outcome = Fleet().run(flags, tmp_path / "launch")
    lines = [line for output in outcome.outputs.values() for line in output.splitlines() if "train.py: error: " in line]
    assert len(lines) == 1, outcome.described()
    assert named in lines[0]
    assert outcome.codes == {0: 2, 1: 2}, outcome.described()
    assert not (tmp_path / "out").exists()


def test_a_program_started_from_another_folder_prints_one_line_and_exits_with_2(folder, tmp_path):
    """The real process: no import depends on the working folder, and stderr ends with the line."""
    flags = {**train_flags(folder, tmp_path / "out"), "smt_config": write_config(tmp_path, warmup={"steps": 0})}
    done = subprocess.run(
        [sys.executable, str(LAUNCH / "train.py"), *command_line(flags)],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "warmup.steps" in Outcome(done.returncode, done.stdout, done.stderr).error
    assert len(done.stderr.splitlines()) == 1
