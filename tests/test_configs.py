"""What lies in configs/ can be run as it is, and the figures in configs/README.md are what the files amount to."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from deepspeed.launcher.runner import fetch_hostfile
from deepspeed.launcher.runner import parse_args as parse_deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM

from smt_dist.config import SMTConfig
from smt_dist.selection.warmup import plan_grids
from smt_dist.sparse.targets import count_parameters_2d
from smt_dist.training.arguments import DTYPES, SMTTrainingArguments, prepare_deepspeed_config
from smt_dist.training.run_arguments import RunArguments
from smt_dist.training.trainer import STATE_BYTES

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
README = CONFIGS / "README.md"
DEEPSPEED = sorted(path.stem for path in (CONFIGS / "deepspeed").iterdir())
ACCELERATE = sorted(path.stem for path in (CONFIGS / "accelerate").iterdir())
SCRIPTS = sorted(path.name for path in (CONFIGS / "nodes").iterdir() if path.name != "hostfile")
RANKS = (8, 64)


class Model(NamedTuple):
    """An architecture that an SMT config is for."""

    name: str
    parameters: int  # as published
    config: LlamaConfig


def llama(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool = False):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


MODELS = {
    "quickstart": Model("SmolLM2-135M", 134_515_008, llama(576, 1536, 30, 9, 3, 49152, tied=True)),
    "smt": Model("Llama-2-7B", 6_738_415_616, llama(4096, 11008, 32, 32, 32, 32000)),
    "llama-2-13b": Model("Llama-2-13B", 13_015_864_320, llama(5120, 13824, 40, 40, 40, 32000)),
    "llama-3-8b": Model("Llama-3-8B", 8_030_261_248, llama(4096, 14336, 32, 32, 8, 128256)),
    "llama-3-70b": Model("Llama-3-70B", 70_553_706_496, llama(8192, 28672, 80, 64, 8, 128256)),
}


class Plan(NamedTuple):
    """What an SMT config amounts to on its model."""

    parameters: int
    parameters_2d: int
    block_elements: int
    budgets: dict[str, int]  # group -> blocks to train
    available: dict[str, int]  # group -> blocks there are
    score: str

    @property
    def trainable(self) -> int:
        return sum(self.budgets.values()) * self.block_elements

    def optimizer_bytes(self, ranks: int) -> int:
        return -(-STATE_BYTES * self.trainable // ranks)

    def warmup_bytes(self, ranks: int) -> int:
        blocks = sum(self.available.values())
        # mean_abs streams one fp64 sum a block on every rank; the others shard G in fp32.
        return 8 * blocks if self.score == "mean_abs" else -(-4 * blocks * self.block_elements // ranks)


@cache
def plan(name: str) -> Plan:
    """Everything on the meta device: no weight is allocated."""
    with torch.device("meta"):
        model = LlamaForCausalLM(MODELS[name].config)
    config = SMTConfig.from_json_file(CONFIGS / f"{name}.json")
    groups, grids = plan_grids(model, config)
    elements = next(iter(grids.values())).block_elements
    parameters_2d = count_parameters_2d(model)
    return Plan(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        parameters_2d=parameters_2d,
        block_elements=elements,
        budgets={group.name: group.budget(parameters_2d, elements) for group in config.groups},
        available={group: sum(len(grids[module]) for module in modules) for group, modules in groups.items()},
        score=config.selection.score,
    )


def table_row(name: str) -> str:
    """A config's line of the table in configs/README.md."""
    known = plan(name)
    config = SMTConfig.from_json_file(CONFIGS / f"{name}.json")
    cells = [
        f"`{name}.json`",
        MODELS[name].name,
        f"{known.parameters_2d:,}",
        " + ".join(f"{group.fraction:.2%}" for group in config.groups),
        f"{sum(known.budgets.values()):,}",
        f"{known.trainable:,}",
        " / ".join(megabytes(known.optimizer_bytes(ranks)) for ranks in RANKS),
        f"`{known.score}`",
        " / ".join(megabytes(known.warmup_bytes(ranks)) for ranks in RANKS),
    ]
    return f"| {' | '.join(cells)} |"


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def test_every_smt_config_is_in_the_table_of_models():
    """A config that nobody names a model for is in none of the checks below."""
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_here_are_the_published_ones(name):
    """Figures for a model that doesn't exist would all be wrong, and agree with one another."""
    assert plan(name).parameters == MODELS[name].parameters


@pytest.mark.parametrize("name", MODELS)
def test_an_smt_config_fits_its_model(name):
    """Blocks that don't divide a target, or more blocks than there are, are refused: the latter after the warm-up."""
    known = plan(name)  # raises where a block doesn't divide a target
    for group, budget in known.budgets.items():
        assert 1 <= budget <= known.available[group]


@pytest.mark.parametrize("name", MODELS)
def test_an_smt_config_trains_the_share_that_it_says(name):
    """The fraction is what runs are compared by: it may lose less than one block to rounding, never win one."""
    known = plan(name)
    for group in SMTConfig.from_json_file(CONFIGS / f"{name}.json").groups:
        lost = group.fraction * known.parameters_2d - known.budgets[group.name] * known.block_elements
        assert 0 <= lost < known.block_elements


@pytest.mark.parametrize("name", MODELS)
def test_the_table_says_what_the_config_amounts_to(name):
    """Memory is planned by this table. Here a wrong line fails with the right one."""
    rows = [line for line in README.read_text().splitlines() if line.startswith(f"| `{name}.json`")]
    assert rows == [table_row(name)]


def test_the_readme_says_what_the_papers_score_costs_at_70b():
    """It is the reason for choosing another score there."""
    known = plan("llama-3-70b")._replace(score="abs_mean")
    shown = " / ".join(megabytes(known.warmup_bytes(ranks)) for ranks in RANKS)
    assert f"would keep {shown} MB" in README.read_text()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", DEEPSPEED)
def test_a_deepspeed_config_is_taken_and_is_what_its_name_says(name, dtype):
    """A file called zero3 that runs stage 2, or an offload that DeepSpeed doesn't see, is found out by memory alone."""
    config = prepare_deepspeed_config(str(CONFIGS / "deepspeed" / f"{name}.json"), dtype)
    zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert zero.stage == int(name.removesuffix("_offload")[-1])
    assert not zero.model_extra, "keys that DeepSpeed doesn't know"
    for section in (zero.offload_param, zero.offload_optimizer):
        assert (section is not None and section.device == "cpu") == name.endswith("_offload")
    # Else DeepSpeed refuses torch's AdamW beside offload_optimizer, and accelerate puts its own in its place.
    assert config["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize("name", ACCELERATE)
def test_an_accelerate_config_is_taken_and_starts_what_its_name_says(name):
    """accelerate refuses keys that it doesn't know, and a second FSDP or DeepSpeed plugin would shard a second time."""
    config = load_config_from_file(str(CONFIGS / "accelerate" / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (2, 16)
    assert config.fsdp_config == config.parallelism_config == {}
    if not name.startswith("zero"):
        assert (config.distributed_type.value, config.deepspeed_config) == ("MULTI_GPU", {})
        return
    assert config.distributed_type.value == "DEEPSPEED"
    # Other keys would contradict the file, which accelerate refuses.
    assert set(config.deepspeed_config) == {"deepspeed_config_file", "deepspeed_multinode_launcher"}
    assert config.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
    assert config.deepspeed_config["deepspeed_config_file"] == f"configs/deepspeed/{name}.json"
    assert (CONFIGS / "deepspeed" / f"{name}.json").is_file()


def test_the_hostfile_is_read_as_two_nodes_of_eight():
    """DeepSpeed's launcher refuses a line that it can't read, on every node."""
    assert list(fetch_hostfile(str(CONFIGS / "nodes" / "hostfile")).values()) == [8, 8]


def train_flags_named_in(text: str) -> set[str]:
    """The flags behind train.py, or behind a script that hands them to it, in commands and comments."""
    text = re.sub(r"\\\n#?", " ", text)
    commands = re.findall(r"(?:launch/train\.py|smt_dist\.cli\.train|smt-train|nodes/\w+\.(?:sh|sbatch)) (.*)", text)
    return {flag for command in commands for flag in re.findall(r"--(\w+)", command)}


@pytest.mark.parametrize(
    "path",
    [README, *(CONFIGS / "nodes" / name for name in SCRIPTS), *(CONFIGS / "accelerate").iterdir()],
    ids=lambda path: path.name,
)
def test_the_flags_in_examples_exist(path):
    """An example that is refused when it is copied is worse than none."""
    named = train_flags_named_in(path.read_text())
    assert named or path.parent.name == "accelerate"
    parser = HfArgumentParser([RunArguments, SMTTrainingArguments])
    known = {option.lstrip("-") for action in parser._actions for option in action.option_strings}
    assert named - known == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_node_script_can_be_started(name):
    """What git doesn't mark as executable, and what bash can't parse, fails on every node at once."""
    script = CONFIGS / "nodes" / name
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


# Stand-ins for what the scripts call. A launcher writes down its arguments.
STAND_INS = {
    "torchrun": r"""printf '%s\0' "$@" > "$CALL" """,
    "deepspeed": r"""printf '%s\0' "$@" > "$CALL" """,
    "srun": r"""while [[ "$1" == --* ]]; do shift; done; exec "$@" """,
    "scontrol": rf"""case "$2" in
  job) printf 'JobId=7 JobName=smt_dist\n   Command={CONFIGS}/nodes/slurm.sbatch --engine ddp\n   WorkDir=/\n' ;;
  hostnames) printf 'first\nsecond\nthird\n' ;;
esac""",
}
SLURM = {
    "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "x", "SLURM_JOB_NUM_NODES": "3", "SLURM_GPUS_ON_NODE": "4",
    "SLURM_CPUS_PER_TASK": "32",
}  # fmt: skip
NODES = {
    "MAX_RESTARTS": "5",
    "NODES": "3",
    "GPUS_PER_NODE": "4",
    "HEAD_NODE": "first",
    "NODE_RANK": "2",
    "PORT": "20007",
}


def start(name: str, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a node script among stand-ins, in a folder that isn't the repository's."""
    for stand_in, body in STAND_INS.items():
        (folder / stand_in).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / stand_in).chmod(0o755)
    script = CONFIGS / "nodes" / name
    if name == "slurm.sbatch":  # Slurm runs a copy from its spool
        script = Path(shutil.copy(script, folder / "slurm_script"))
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "CALL": str(folder / "call")}
    return subprocess.run([str(script), *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_node_script_starts_train_py_on_the_nodes_that_it_is_told(tmp_path, name):
    """Where a value doesn't reach the launcher, ranks wait for others that never come, and time out much later."""
    arguments = ["--engine", "ddp", "--train_file", "a file.json"]
    done = start(name, tmp_path, *arguments, **(SLURM if name == "slurm.sbatch" else NODES))
    assert (done.returncode, done.stderr) == (0, "")
    call = (tmp_path / "call").read_text().split("\0")[:-1]
    if name.startswith("deepspeed"):
        known = parse_deepspeed(call)
        assert (known.num_nodes, known.num_gpus, known.master_addr, known.master_port) == (3, 4, "first", 20007)
        assert fetch_hostfile(known.hostfile)
        assert (known.no_ssh, known.node_rank) == ((True, 2) if "no_ssh" in name else (False, -1))
        started, passed_on = known.user_script, known.user_args
    else:
        known = torchrun_parser().parse_args(call)
        assert (known.nnodes, known.nproc_per_node, known.rdzv_endpoint) == ("3", "4", "first:20007")
        assert known.rdzv_backend == "c10d"
        assert known.max_restarts == (5 if name == "torchrun.sh" else 0)
        started, passed_on = known.training_script, known.training_script_args
    assert Path(started) == ROOT / "launch" / "train.py"
    assert passed_on == arguments


@pytest.mark.parametrize(
    ("name", "missing"),
    [("torchrun.sh", "HEAD_NODE"), ("deepspeed_no_ssh.sh", "HEAD_NODE"), ("deepspeed_no_ssh.sh", "NODE_RANK")],
)
def test_a_node_script_names_the_value_that_it_lacks(tmp_path, name, missing):
    """A guess would make every node wait for itself."""
    done = start(name, tmp_path, **{key: value for key, value in NODES.items() if key != missing})
    assert done.returncode != 0
    assert f"{missing}: " in done.stderr
    assert not (tmp_path / "call").exists()
