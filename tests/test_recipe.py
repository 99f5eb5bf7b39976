"""A recipe is its flags in front of the command line's, and is refused where they would be."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import train_flags
from transformers import HfArgumentParser

from smt_dist.cli.program import parse_arguments, raise_usage_error
from smt_dist.cli.recipe import MAX_CHARACTERS, expand_recipe
from smt_dist.cli.select import SelectArguments
from smt_dist.config import SMTConfig
from smt_dist.errors import SMTError
from smt_dist.training.arguments import SMTTrainingArguments, prepare_deepspeed_config

KINDS = [SelectArguments, SMTTrainingArguments]
PARSER = HfArgumentParser(KINDS, allow_abbrev=False)
PARSER.error = raise_usage_error

# Much of it is another value, or of another type, to YAML.
RECIPE = r"""
# a comment
output_dir: 1.10
run_name: 010
train_file: "C:\\rows # not a comment.json"
eval_file: 'null'
adapter: -dash
seed: 16
data_seed: "7"
learning_rate: 1e-4
weight_decay: 1_0
save_strategy: no
packing: Yes
selection_report: no
max_steps: ~
logging_steps:
stability:
  - seeds=0,1
  - 2024-01-01
  - 1.10
lr_scheduler_kwargs: {rate: 1e-1, power: 2, deep: {yes_: true, no_: no, text: "3", nothing: null}}
"""
BY_HAND = [
    *("--output_dir", "1.10", "--run_name", "010", "--train_file", r"C:\rows # not a comment.json"),
    *("--eval_file", "null", "--adapter=-dash", "--seed", "16", "--data_seed", "7", "--learning_rate", "1e-4"),
    *("--weight_decay", "1_0", "--save_strategy", "no", "--packing", "Yes", "--selection_report", "no"),
    *("--stability", "seeds=0,1", "2024-01-01", "1.10", "--lr_scheduler_kwargs"),
    '{"rate": 0.1, "power": 2, "deep": {"yes_": true, "no_": "no", "text": "3", "nothing": null}}',
]


def write(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def parse(*words: str) -> dict[str, object]:
    known, left = PARSER.parse_known_args(expand_recipe(list(words), PARSER, KINDS))
    assert left == []
    return vars(known)


def test_a_recipe_is_what_its_flags_are_by_hand(tmp_path):
    """A value that means something else in a file than on the command line is found out when the run is over."""
    assert parse(write(tmp_path, RECIPE)) == parse(*BY_HAND)


def test_a_json_recipe_is_what_its_flags_are_by_hand(tmp_path):
    """For recipes that programs write."""
    content = {
        "seed": 3,
        "learning_rate": 1e-4,
        "selection_report": False,
        "save_strategy": "no",
        "stability": ["halves", "a"],
    }
    content |= {"max_steps": None, "lr_scheduler_kwargs": {"power": 2.5}}
    flags = ["--seed", "3", "--learning_rate", "0.0001", "--no_selection_report", "--save_strategy", "no"]
    flags += ["--stability", "halves", "a", "--lr_scheduler_kwargs", '{"power": 2.5}']
    assert parse(write(tmp_path, json.dumps(content), "recipe.json")) == parse(*flags)


SETTINGS = {
    "run_name": st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    "seed": st.integers(-(10**12), 10**12),
    "learning_rate": st.floats(allow_nan=False, allow_infinity=False),
    "packing": st.booleans(),
    "stability": st.lists(st.from_regex(r"[\w=,. ]+", fullmatch=True), min_size=1, max_size=4),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(content=st.fixed_dictionaries({}, optional=SETTINGS).filter(bool))
def test_what_a_yaml_or_json_writer_writes_comes_back(tmp_path_factory, content):
    """Quotes, escapes, exponents and long lines are the writer's choice."""
    folder = tmp_path_factory.mktemp("recipes")
    for text, name in ((yaml.safe_dump(content), "r.yaml"), (json.dumps(content), "r.json")):
        known = parse(write(folder, text, name))
        assert {key: known[key] for key in content} == content


def test_flags_of_the_command_line_win(tmp_path):
    """All of them, also the ones that switch off, and those of a launcher that comes first."""
    path = write(tmp_path, "seed: 1\nmax_steps: 5\nselection_report: true\nstability: [a, b]\npacking: true")
    known = parse("--local_rank=1", path, "--seed", "2", "--no_selection_report", "--stability", "c", "--packing=false")
    assert (known["seed"], known["max_steps"], known["local_rank"]) == (2, 5, 1)
    assert (known["selection_report"], known["stability"], known["packing"]) == (False, ["c"], False)


@pytest.mark.parametrize("words", [[], ["--seed", "1"], ["--local_rank=0", "--seed", "1"], ["--seed=1", "r.yaml"]])
def test_a_command_line_without_a_recipe_stays_as_it_is(words):
    """Only the first word can be one: elsewhere it might be a flag's value."""
    assert expand_recipe(words, PARSER, KINDS) == words


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("sed: 1", "sed: unknown key; did you mean seed?"),
        ("xyzzy: null", "xyzzy: unknown key; keys are flags"),
        ("--seed: 1", "--seed: unknown key; did you mean seed?"),
        ("max-steps: 1", "max-steps: unknown key; did you mean max_steps?"),
        ("no_selection_report: true", "no_selection_report: unknown key; did you mean selection_report?"),
        ("help: true", "help: unknown key"),
        ("seed=3 --packing: 1", "unknown key"),
        ("seed: x", "seed: invalid int value: 'x'"),
        ("seed: 1.5", "seed: invalid int value: '1.5'"),
        ("seed: true", "seed: invalid int value: 'true'"),
        ("learning_rate: fast", "learning_rate: invalid float value: 'fast'"),
        ("packing: perhaps", "packing: Truthy .*perhaps"),
        ("dtype: fp16", "dtype: 'fp16' is not one of float32, bfloat16"),
        ("packing: ''", "packing: "),
        ("save_strategy: sometimes", "save_strategy: 'sometimes' is not one of no, steps, epoch"),
        ("seed: [1, 2]", "seed: takes one value, not 2"),
        ("seed: []", "seed: a list holds one value"),
        ("stability: [[a]]", "stability: a list holds .* no lists"),
        ("stability: [a, null]", "stability: a list holds .* nulls"),
        ("stability: [{a: b}]", "stability: a list holds .* mappings"),
        ("stability: [-a, -b]", "stability: an item of a list can't begin with a dash"),
        ("output_dir: {a: 1}", "output_dir: takes no mapping"),
        ("seed: 1\nseed: 2", "line 2: .*seed appears twice"),
        ("lr_scheduler_kwargs:\n  a: 1\n  a: 2", "line 3: .*a appears twice"),
        ("1: 2", "line 1: .*a key is a name"),
        ("lr_scheduler_kwargs: {1: 2}", "a key is a name"),
        ("[a]: 2", "a key is a name"),
        ("<<: {seed: 1}", "a key is a name"),
        ("- seed", "holds no flags"),
        ("seed", "holds no flags"),
        ("", "holds no flags"),
        ("# seed: 1", "holds no flags"),
        ("{}", "holds no flags"),
        ("seed: 1\nmax_steps: a: b", "line 2: not a recipe's YAML"),
        ("seed: [1", "not a recipe's YAML"),
        ("\tseed: 1", "not a recipe's YAML"),
        ("seed: 1\n---\nseed: 2", "not a recipe's YAML"),
        ("seed: \x00", "not a recipe's YAML"),
        ("run_name: " + "[" * 2000, "not a recipe's YAML"),
        ("seed: &a 1\ndata_seed: *a", "line 2: .*no aliases"),
        ("run_name: !!python/object/apply:os.system [true]", "no values of .*python"),
        ("run_name: !mine x", "no values of !mine"),
        ("# " + "x" * MAX_CHARACTERS, "are too many for a recipe"),
    ],
    ids=lambda text: text[:40],
)
def test_a_recipe_that_is_wrong_is_refused_in_one_line_that_names_file_and_key(tmp_path, text, named):
    """Among a hundred flags of TrainingArguments a mistyped one would go unseen."""
    path = write(tmp_path, text)
    with pytest.raises(SMTError, match=named) as caught:
        parse(path)
    assert str(caught.value).startswith(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "holds no flags"),
        ('{"seed": 1, "seed": 2}', "'seed' appears twice"),
        ('{"seed": 1.5}', "seed: invalid int value: '1.5'"),
        ('{"sed": 1}', "did you mean seed?"),
        ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
    ids=lambda text: text[:40],
)
def test_a_json_recipe_that_is_wrong_is_refused_likewise(tmp_path, text, named):
    """By the same rules, and the JSON reader's."""
    path = write(tmp_path, text, "recipe.json")
    with pytest.raises(SMTError, match=named) as caught:
        parse(path)
    assert str(caught.value).startswith(path)


def test_what_is_no_recipe_is_refused_by_name(tmp_path):
    """A file that isn't there, isn't text, or something that stands in the recipe's place."""
    for words, named in (
        (["nowhere.yaml"], "nowhere.yaml: No such file"),
        ([f"{tmp_path}.json"], "No such file"),
        (["train"], "train: neither a flag nor a recipe, which ends in .yaml, .yml, .json"),
        ([write(tmp_path, "stability: [a, b]"), "stray"], "stray: only flags follow a recipe"),
    ):
        with pytest.raises(SMTError) as caught:
            parse(*words)
        assert named in str(caught.value)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SMTError, match="not UTF-8"):
        parse(str(tmp_path / "binary.yaml"))


def test_a_program_reads_a_recipe_as_it_reads_flags(tmp_path, monkeypatch):
    """The arguments' own checks and conversions see no difference."""
    path = write(tmp_path, "output_dir: out\nlr_scheduler_kwargs: {power: 2}\nmax_steps: 7\ntrain_file: t.json\n")
    flags = [
        "--output_dir",
        "out",
        "--lr_scheduler_kwargs",
        '{"power": 2}',
        "--max_steps",
        "7",
        "--train_file",
        "t.json",
    ]
    both = []
    for words in ([path, "--seed", "3"], [*flags, "--seed", "3"]):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        run, args = parse_arguments(SelectArguments, None)
        both.append((run, {key: value for key, value in args.to_dict().items() if key != "logging_dir"}))
    assert both[0] == both[1]
    assert (both[0][1]["max_steps"], both[0][1]["seed"]) == (7, 3)
    assert both[0][1]["lr_scheduler_kwargs"] == {"power": 2}


def test_a_deepspeed_config_may_stand_in_the_recipe(tmp_path):
    """Text that is a JSON object is no file's name."""
    text = parse(write(tmp_path, "deepspeed: {zero_optimization: {stage: 3}}"))["deepspeed"]
    assert prepare_deepspeed_config(text, torch.float32)["zero_optimization"] == {"stage": 3}
    with pytest.raises(SMTError, match=r"^--deepspeed: zero_optimization.stage must be"):
        prepare_deepspeed_config('{"zero_optimization": {"stage": 7}}', torch.float32)


def test_a_run_from_a_recipe_ends_as_one_from_flags(run, train, folder, tmp_path):
    """The whole program: the same adapter, and a mistake in the file is one line."""
    flags = train_flags(folder, tmp_path / "recipe_out")
    recipe = write(tmp_path, yaml.safe_dump({key: str(value) for key, value in flags.items()}))
    outcome = run("train.py", recipe, "--max_steps", "2")
    assert outcome.code == 0, outcome.err
    assert train(max_steps=2).code == 0
    name = "smt_blocks.safetensors"
    assert (tmp_path / "recipe_out" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    for program in ("train.py", "select_blocks.py"):
        assert f"{recipe}: sead: unknown key" in run(program, write(tmp_path, "sead: 1")).error


def test_a_recipe_may_hold_the_smt_config_itself(tmp_path):
    """One file then says all of a run; as JSON text on the command line it is the same."""
    text = "smt_config:\n  block_size: [16, 8]\n  untie: true\n  groups:\n    - {name: a, fraction: 0.03}\n"
    config = SMTConfig.from_flag(parse(write(tmp_path, text))["smt_config"])
    assert (config.block_size, config.untie, config.groups[0].fraction) == ((16, 8), True, 0.03)
    assert config == SMTConfig.from_flag(config.to_json())
    with pytest.raises(SMTError, match=r"^--smt_config: block_size: expected a side"):
        SMTConfig.from_flag(parse(write(tmp_path, "smt_config: {block_size: 0}"))["smt_config"])


def test_a_list_holds_no_flags(tmp_path):
    """A key that is no flag is refused; an item that is one would set it unseen."""
    with pytest.raises(SMTError, match="report_to: an item of a list can't begin with a dash"):
        parse(write(tmp_path, "report_to: [none, '--seed=3']"))


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path):
    """As some editors write it, in both formats."""
    for name, text in (("r.yaml", "seed: 3"), ("r.json", '{"seed": 3}')):
        assert parse(write(tmp_path, f"\ufeff{text}", name))["seed"] == 3


def test_a_recipe_behind_a_flag_is_told_where_it_belongs(tmp_path, monkeypatch):
    """Else it is an unknown value among many."""
    words = ["--seed", "1", write(tmp_path, "seed: 3")]
    monkeypatch.setattr(sys, "argv", ["smt-train", *words])
    with pytest.raises(SMTError, match="a recipe comes before the flags"):
        parse_arguments(SelectArguments, None)
