"""The recipes in configs/ are taken, and say what the pages and the configs say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from smt_dist.cli.program import raise_usage_error
from smt_dist.cli.recipe import expand_recipe
from smt_dist.config import SMTConfig
from smt_dist.training.arguments import SMTTrainingArguments, prepare_deepspeed_config
from smt_dist.training.run_arguments import RunArguments

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "recipes"
README = ROOT / "configs" / "README.md"
RECIPES = sorted(path.stem for path in FOLDER.iterdir())
KINDS = [RunArguments, SMTTrainingArguments]


def parse_flags(words: list[str]) -> dict[str, object]:
    """What a command line amounts to, before anything is looked up for it."""
    parser = HfArgumentParser(KINDS, allow_abbrev=False)
    parser.error = raise_usage_error
    known, left = parser.parse_known_args(expand_recipe(words, parser, KINDS))
    assert left == []
    return vars(known)


def page_command(page: Path, model: str) -> list[str]:
    """The flags of a page's command for a model."""
    text = re.sub(r"\\\n", " ", page.read_text())
    (command,) = re.findall(rf"(?:launch/train\.py|nodes/torchrun\.sh) (.*{model}.*)", text)
    return shlex.split(command, comments=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_taken_and_its_files_are_there(name):
    """It is read before a cluster is rented, or after."""
    path = FOLDER / f"{name}.yaml"
    flags = parse_flags([str(path)])
    assert flags["smt_config"] == f"configs/{name}.json"
    SMTConfig.from_json_file(ROOT / flags["smt_config"])
    if flags["deepspeed"]:
        prepare_deepspeed_config(str(ROOT / flags["deepspeed"]), torch.bfloat16)
    run = RunArguments(**{field: flags[field] for field in RunArguments.__dataclass_fields__})
    run.check()
    run.check_data()
    # The command in its head starts it, and the table says what it amounts to.
    (start,) = [line.lstrip("# ") for line in path.read_text().splitlines() if f"recipes/{name}.yaml" in line]
    nodes, ranks = re.search(r"NODES=(\d+)", start), re.search(r"(?:--num_gpus|--nproc_per_node) (\d+)", start)
    world_size = int(nodes[1]) * 8 if nodes else int(ranks[1])
    batch = world_size * flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"]
    (row,) = [line for line in README.read_text().splitlines() if line.startswith(f"| `{name}.yaml`")]
    assert row.endswith(f"| {batch} |")
    assert world_size % flags["dp_replicate_size"] == 0


@pytest.mark.parametrize(
    ("page", "name", "model"),
    [
        ("README.md", "llama-2-13b", "meta-llama/Llama-2-13b-hf"),
        ("docs/getting-started.md", "llama-2-13b", "meta-llama/Llama-2-13b-hf"),
        ("docs/scaling.md", "llama-3-70b", "meta-llama/Meta-Llama-3-70B"),
    ],
)
def test_a_recipe_says_what_the_pages_say(page, name, model):
    """Two sets of values for one model: nobody knows which one was meant."""
    command = page_command(ROOT / page, model)
    recipe, shown = parse_flags([str(FOLDER / f"{name}.yaml")]), parse_flags(command)
    configs = [SMTConfig.from_json_file(ROOT / flags.pop("smt_config")) for flags in (recipe, shown)]
    assert configs[0] == configs[1]
    given = {word.lstrip("-") for word in command if word.startswith("--")} - {"smt_config", "output_dir"}
    assert {flag: recipe[flag] for flag in given} == {flag: shown[flag] for flag in given}


def test_the_quickstart_runs_its_recipe():
    """The figures in docs/getting-started.md are this recipe's."""
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    assert "launch/train.py configs/recipes/quickstart.yaml" in script
    recipe = parse_flags([str(FOLDER / "quickstart.yaml")])
    assert f'steps="${{STEPS:-{recipe["max_steps"]}}}"' in script
    assert f'output="${{OUTPUT:-{Path(recipe["output_dir"]).parent}}}"' in script


@pytest.mark.parametrize(
    "path",
    [README, ROOT / "README.md", ROOT / "docs" / "getting-started.md"],
    ids=["configs", "main", "getting-started"],
)
def test_the_recipes_in_examples_exist(path):
    """A path that is mistyped is found out on the cluster."""
    named = set(re.findall(r"configs/recipes/(\S+?)\.yaml", path.read_text()))
    assert named <= set(RECIPES)
