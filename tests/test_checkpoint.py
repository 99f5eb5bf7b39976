"""A checkpoint holds the blocks' training and nothing of the base, and going on from it is as if nothing happened."""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from pathlib import Path

import pytest
import torch
from harness import launch
from safetensors import safe_open
from tiers import Check, all_differences, chosen, slow_unless
from tiny_models import make_rows, save_tiny_llama
from transformers import AutoModelForCausalLM, Trainer
from workers.checkpoints import BEST_AT, STEPS
from workers.training import BLOCK, BLOCKS

import smt_dist
from smt_dist.checkpoint.adapter import BLOCKS_FILE, CARD_FILE, CONFIG_FILE, SELECTION_FILE, read_adapter
from smt_dist.checkpoint.atomic import MANIFEST_FILE
from smt_dist.checkpoint.training_state import OPTIMIZER_FILE, SCHEDULE_FILE
from smt_dist.training.rounds import ReselectingTrainer
from smt_dist.training.trainer import SMTTrainer

DTYPES = ("float32", "bfloat16")
PLANS = {
    1: [["ddp", dtype] for dtype in DTYPES],
    2: [[engine, dtype] for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for dtype in DTYPES],
}
BEST_OF = {1: ["ddp"], 2: ["ddp", "fsdp2", "zero2", "zero3"]}
RUNS = [(world_size, *run) for world_size, runs in PLANS.items() for run in runs]
QUICK = [(2, "ddp", "float32"), (2, "fsdp2", "bfloat16"), (2, "zero3", "bfloat16")]
each_run = pytest.mark.parametrize(
    "run", slow_unless(RUNS, lambda run: run in QUICK), ids=lambda run: f"{run[1]}-{run[0]}ranks-{run[2]}"
)
each_best = pytest.mark.parametrize(
    "best",
    slow_unless(
        [(size, engine) for size, engines in BEST_OF.items() for engine in engines],
        lambda best: best in [(2, "ddp"), (2, "zero3")],
    ),
    ids=lambda run: f"{run[1]}-{run[0]}ranks",
)

# A head that makes the base far larger than the blocks, so that a copy of it can't hide in a folder's size.
WIDE = {"attention_dropout": 0.2, "vocab_size": 4000}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"), **WIDE)


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, model_folder):
    """Run, or (world size, engine) of keeping the best -> each rank's findings."""
    results, runs, best = {}, chosen(request, "run"), chosen(request, "best")
    for world_size in sorted({run[0] for run in runs + best}):
        own, own_best = ([run for run in asked if run[0] == world_size] for asked in (runs, best))
        ranks = launch(
            "workers.checkpoints:everything",
            world_size,
            tmp_path_factory.mktemp(f"ranks{world_size}"),
            model=str(model_folder),
            runs=[run[1:] for run in own],
            best_of=[engine for _, engine in own_best],
        )
        results |= {run: [rank["resumed"][index] for rank in ranks] for index, run in enumerate(own)}
        results |= {run: [rank["best"][run[1]] for rank in ranks] for run in own_best}
    return results


@pytest.fixture
def ranks(found, run):
    """Each rank's findings of one run."""
    return found[run]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# -- resume ----------------------------------------------------------------------------------------------------


@each_run
def test_resumed_training_is_the_same_bit_by_bit(ranks, run):
    """Dropout, data order and schedule go on where they were; a loss that is only close means that one doesn't.

    Rounding a master to the base's dtype would show in its bits; what a user keeps of an interrupted run must be what
    the run without interruption gives.
    """
    folder = Path(ranks[0]["folder"])
    with all_differences() as check:
        for index, rank in enumerate(ranks):
            straight, resumed = rank["straight"], rank["resumed"]
            with check(f"rank {index}: steps"):
                assert len(straight["losses"]) == straight["step"] == resumed["step"] == STEPS
            for key in ("losses", "gradient_norms", "learning_rates"):
                with check(f"rank {index}: {key}"):
                    assert resumed[key] == straight[key]
            with check(f"rank {index}: random state"):
                assert torch.equal(straight["random"], resumed["random"])
            check_state(check, index, straight["state"], resumed["state"])
        for name in (BLOCKS_FILE, SELECTION_FILE, CONFIG_FILE):
            with check(f"the adapter's {name}"):
                assert (folder / "again" / name).read_bytes() == (folder / "straight" / name).read_bytes()
        check_claims(check, run, ranks)


def check_state(check: Check, index: int, straight: dict, resumed: dict) -> None:
    """Compare masters and moments bit by bit."""
    with check(f"rank {index}: modules"):
        assert set(straight) == set(resumed) == set(BLOCKS)
    for module, tensors in straight.items():
        with check(f"rank {index}: tensors of {module}"):
            assert set(tensors) == {"delta", "exp_avg", "exp_avg_sq"}
        for name, tensor in tensors.items():
            with check(f"rank {index}: {name} of {module}"):
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, resumed[module][name])


def check_claims(check: Check, run: tuple[int, str, str], ranks: list[dict]) -> None:
    """Check what is compared: engine, world size, and that randomness and training mattered."""
    world_size, engine, dtype = run
    wrapper = {"ddp": "LlamaForCausalLM", "fsdp2": "FSDPLlamaForCausalLM"}.get(engine, "DeepSpeedEngine")
    sharded = "ShardedBlockOptimizer"
    stepper = {"ddp": sharded, "fsdp2": sharded, "zero3": "DeepSpeedZeroOptimizer_Stage3"}.get(
        engine, "DeepSpeedZeroOptimizer"
    )
    if (engine, dtype) == ("zero1", "bfloat16"):
        stepper = "BF16_Optimizer"  # DeepSpeed's choice for stage 1 with fp32 gradients
    for index, rank in enumerate(ranks):
        with check(f"rank {index}: world size"):
            assert rank["world_size"] == world_size
        with check(f"rank {index}: engine"):
            assert rank["engine"].startswith(wrapper)
            assert rank["engine"].endswith(f", {stepper}")
        before = read_adapter(rank["checkpoint"]).deltas
        for module, tensors in rank["straight"]["state"].items():
            with check(f"rank {index}: {module} moved"):
                assert not torch.equal(before[module], tensors["delta"])
        with check(f"rank {index}: losses differ from step to step"):
            assert len(set(rank["straight"]["losses"])) == STEPS


# -- what is on disk -------------------------------------------------------------------------------------------


@each_run
def test_checkpoint_holds_the_blocks_training_and_nothing_of_the_base(ranks, run, model_folder):
    """A checkpoint with the base in it is why SMT's would be as large and as slow as full fine-tuning's."""
    world_size = run[0]
    folder = Path(ranks[0]["checkpoint"])
    assert {path.name for path in folder.iterdir()} == {
        *(CONFIG_FILE, SELECTION_FILE, BLOCKS_FILE, CARD_FILE, OPTIMIZER_FILE, SCHEDULE_FILE, MANIFEST_FILE),
        *(f"rng_state_{rank}.json" for rank in range(world_size)),
        "trainer_state.json",
    }
    assert set(tensors_of(folder / BLOCKS_FILE)) == set(BLOCKS)
    assert set(tensors_of(folder / OPTIMIZER_FILE)) == {f"{m}:{k}" for m in BLOCKS for k in ("exp_avg", "exp_avg_sq")}
    weights = folder / BLOCKS_FILE, folder / OPTIMIZER_FILE
    selected = ranks[0]["straight"]["state"]
    elements = sum(tensors["delta"].numel() for tensors in selected.values())
    assert sum(path.stat().st_size for path in weights) <= 12 * elements + 8192
    assert (
        sum(path.stat().st_size for path in folder.iterdir())
        < model_folder.joinpath("model.safetensors").stat().st_size / 4
    )
    for rank in ranks:  # or `--resume_from_checkpoint auto` would start anew, over the old run's output
        assert Path(rank["newest"]).name == f"checkpoint-{STEPS}"


@each_run
def test_adapter_is_complete_and_small_and_loads_elsewhere(ranks, run, model_folder):
    """Under ZeRO-3 each rank sees a part, or nothing, of a parameter: what is saved must be the whole, unrounded.

    And nothing beside it: more than 4 bytes a selected element is a second copy or a part of the base.
    """
    folder = Path(ranks[0]["folder"]) / "straight"
    adapter = read_adapter(folder)
    with all_differences() as check:
        for index, rank in enumerate(ranks):
            for module, tensors in rank["straight"]["state"].items():
                with check(f"rank {index}: {module}"):
                    assert adapter.deltas[module].shape == (len(BLOCKS[module]) * BLOCK[0], BLOCK[1])
                    assert torch.equal(adapter.deltas[module], tensors["delta"])
        if run[2] == "bfloat16":
            with check("masters are finer than bf16"):
                assert all((delta != delta.bfloat16().float()).any() for delta in adapter.deltas.values())
        elements = sum(len(blocks) for blocks in BLOCKS.values()) * BLOCK[0] * BLOCK[1]
        with check("bytes on disk"):
            assert 4 * elements < (folder / BLOCKS_FILE).stat().st_size <= 4 * elements + 4096
        check_loads(check, ranks[0], folder, model_folder)


def check_loads(check: Check, rank: dict, folder: Path, model_folder: Path) -> None:
    """Load it where nothing was trained: the folder alone must change what the model says."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = torch.tensor([make_rows(1)[0]["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        smt_dist.load_adapter(model, folder)
        after = model(ids).logits
    with check("loaded, it changes the logits"):
        assert (after - before).norm() > 1e-2 * before.norm()
    for name, layer in smt_dist.sparse_layers(model).items():
        with check(f"loaded, {name}"):
            assert torch.equal(layer.delta, rank["straight"]["state"][name]["delta"])


# -- the best checkpoint ---------------------------------------------------------------------------------------


@each_best
def test_best_blocks_come_back_at_the_end(found, best):
    """``load_best_model_at_end`` that does nothing hands over the worst model of a run that diverged."""
    for result in found[best]:
        assert Path(result["best"]).name == f"checkpoint-{BEST_AT}"
        assert result["best"] != result["last"]
        saved = read_adapter(result["best"]).deltas
        assert all(torch.equal(result["blocks"][module], saved[module]) for module in BLOCKS)
        losses = result["evaluation_losses"]
        assert result["loss_with_them"] == losses[BEST_AT - 1] != losses[-1]
        final = read_adapter(Path(result["best"]).parent).deltas
        assert all(torch.equal(final[module], saved[module]) for module in BLOCKS)


# -- the methods that are overridden ---------------------------------------------------------------------------

OVERRIDDEN = [
    "create_optimizer",
    "_clip_grad_norm",
    "_get_grad_norm",
    "save_model",
    "save_metrics",
    "train",
    "_save_checkpoint",
    "_finalize_training",
    "_load_rng_state",
    "_load_from_checkpoint",
    "_prepare_for_training",
    "_load_best_model",
    "_sync_replicated_trainable_parameters",
    "compute_loss",
    "training_step",
    "evaluate",
    "_run_epoch",
    "_determine_best_metric",
    "_get_dataloader",
    "get_batch_samples",
    "evaluation_loop",
    "prediction_step",
]


def overridden() -> set[str]:
    """Names of Trainer's methods that SMTTrainer or its subclass define anew."""
    ours = {name for owner in (SMTTrainer, ReselectingTrainer) for name in vars(owner)} - {"__init__"}
    return {name for name in ours if callable(getattr(Trainer, name, None)) and not name.startswith("__")}


def test_overridden_methods_still_exist_in_trainer():
    """A method that transformers renames isn't overridden any more, silently: the base would be in checkpoints."""
    with all_differences() as check:
        for name in OVERRIDDEN:
            with check(name):
                assert name in overridden()
                theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
                for owner in (SMTTrainer, ReselectingTrainer):
                    ours = list(inspect.signature(getattr(owner, name)).parameters)
                    assert ours in (theirs, ["self", "args", "kwargs"])  # or it hands on whatever it is given


def test_overrides_are_short_and_say_why():
    """The work is done elsewhere, where it can be read and tested without Trainer."""
    with all_differences() as check:
        for owner, name in itertools.product((SMTTrainer, ReselectingTrainer), OVERRIDDEN):
            if name in vars(owner):
                source = textwrap.dedent(inspect.getsource(vars(owner)[name]))
                (function,) = ast.parse(source).body
                body = function.body[1:] if ast.get_docstring(function) else function.body
                lines = source.splitlines()[body[0].lineno - 1 :]
                with check(f"{owner.__name__}.{name}"):
                    assert len([line for line in lines if not line.strip().startswith("#")]) <= 5
                    assert "# " in source


def test_list_of_overridden_methods_is_complete():
    """Guards the test above."""
    assert overridden() == set(OVERRIDDEN)
