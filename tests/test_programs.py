"""The programs as a user runs them: from files to files, and one clear line where that can't be."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architectures import logits_of, make_model
from safetensors.torch import load_file
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM

import smt_dist
from smt_dist.cli import run_program
from smt_dist.errors import SMTError

LAUNCH = Path(__file__).parents[1] / "launch"
CONFIG = {
    "block_size": 8,
    "groups": [{"name": "attention", "target_modules": "attention", "blocks": 6}],
    "warmup": {"steps": 2},
}
ROWS = [{"instruction": f"add one to {n}", "input": "", "output": str(n + 1)} for n in range(16)]
QUESTIONS = [{"instruction": f"add one to {n}", "input": "", "answer": str(n + 1)} for n in range(4)]
# fp32 and no shuffle of the learning rate: what is compared here must not depend on rounding.
TRAINING = {
    "dtype": "float32", "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


class Outcome(NamedTuple):
    """What a program left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line. There must be exactly one, at the end, and no traceback."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if ": error: " in line]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0]), "the error line isn't the last one"
        return lines[0]


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


def train_flags(folder: Path, output: Path) -> dict[str, object]:
    files = {"model_name_or_path": folder / "model", "train_file": folder / "train.json"}
    return {**files, "smt_config": folder / "smt.json", "output_dir": output, **TRAINING}


def command_line(flags: dict[str, object]) -> list[str]:
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


def load_program(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{Path(name).stem}", LAUNCH / name)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_config(tmp_path: Path, **changes: object) -> Path:
    return write_json(tmp_path / "changed.json", {**CONFIG, **changes})


def logged_losses(checkpoint: Path) -> list[float]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def adapted_logits(folder: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    smt_dist.load_adapter(model, adapter)
    return logits_of(model)


# -- what works --------------------------------------------------------------------------------------------------


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


def test_a_resumed_run_keeps_the_config_of_its_checkpoint(train, tmp_path):
    """Defaults, or an edited file, would change learning rates and what the adapter says of itself."""
    group = {**CONFIG["groups"][0], "lr_multiplier": 0.5}
    flags = {"save_strategy": "steps", "save_steps": 2, "resume_from_checkpoint": "auto"}
    assert train(smt_config=write_config(tmp_path, groups=[group]), max_steps=2, **flags).code == 0
    assert "--smt_config" in train(**flags).error
    resumed = train(smt_config=None, **flags)
    assert resumed.code == 0, resumed.err
    assert json.loads((tmp_path / "out/smt_config.json").read_text())["groups"] == [group]


def test_an_adapter_that_is_continued_starts_from_its_blocks(train, folder, tmp_path):
    """Zeroed or rounded blocks would show in the loss of the first step."""
    assert train(output_dir=tmp_path / "first").code == 0
    same_rows = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "per_device_train_batch_size": len(ROWS)}
    outcome = train(adapter=tmp_path / "first", smt_config=None, output_dir=tmp_path / "second", **same_rows)
    assert outcome.code == 0, outcome.err
    fresh = train(selection=tmp_path / "first/smt_selection.json", output_dir=tmp_path / "third", **same_rows)
    assert fresh.code == 0, fresh.err

    from smt_dist.data import CausalLMCollator, build_dataset
    from smt_dist.rows import read_rows

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


# -- what is refused ---------------------------------------------------------------------------------------------


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
        ({"engine": "fsdp2"}, "--engine: 'fsdp2'"),
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


@pytest.mark.parametrize("mode", ["probe", "full_ft"])
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


RECORD_EXIT_CODE = """
import os, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stopped:
    with open(os.path.join(os.environ["CODES"], os.environ["RANK"]), "w") as file:
        file.write(str(stopped.code))
    raise
"""


# -- real processes ----------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("fault", ["config", "data"])
def test_two_ranks_with_bad_input_all_stop_and_print_one_line(folder, tmp_path, fault):
    """A rank that waits for one that has left hangs until the time-out, hours later on a real cluster."""
    flags = train_flags(folder, tmp_path / "out")
    if fault == "config":
        flags["smt_config"], named = write_config(tmp_path, blok_size=8), "blok_size: unknown key"
    else:
        flags["train_file"], named = write_json(tmp_path / "rows.json", [{"instruction": "a"}]), "row 1: field 'output'"
    (tmp_path / "codes").mkdir()
    (tmp_path / "record.py").write_text(RECORD_EXIT_CODE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "record.py"), str(LAUNCH / "train.py"), *command_line(flags)]
    done = subprocess.run(
        command, env={**environment(), "CODES": str(tmp_path / "codes")}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "train.py: error: " in line]
    assert len(lines) == 1, done.stderr
    assert named in lines[0]
    assert {path.name: path.read_text() for path in (tmp_path / "codes").iterdir()} == {"0": "2", "1": "2"}
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
