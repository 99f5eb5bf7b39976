"""A checkpoint holds the blocks' training and nothing of the base, and going on from it is as if nothing happened."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

import pytest
import torch
from harness import launch
from safetensors import safe_open
from tiny_models import make_rows, save_tiny_llama
from transformers import AutoModelForCausalLM, Trainer
from workers.checkpoints import BEST_AT, STEPS
from workers.training import BLOCK, BLOCKS

import smt_dist
from smt_dist.checkpoint.adapter import BLOCKS_FILE, CARD_FILE, CONFIG_FILE, SELECTION_FILE, read_adapter
from smt_dist.checkpoint.atomic import MANIFEST_FILE
from smt_dist.checkpoint.training_state import OPTIMIZER_FILE, SCHEDULE_FILE
from smt_dist.training.phases import ReselectingTrainer
from smt_dist.training.trainer import SMTTrainer

DTYPES = ("float32", "bfloat16")
PLANS = {
    1: [["ddp", dtype] for dtype in DTYPES],
    2: [[engine, dtype] for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for dtype in DTYPES],
}
BEST_OF = {1: ["ddp"], 2: ["ddp", "fsdp2", "zero2", "zero3"]}
RUNS = [(world_size, *run) for world_size, runs in PLANS.items() for run in runs]
each_run = pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[1]}-{run[0]}ranks-{run[2]}")
each_best = pytest.mark.parametrize(
    "run",
    [(size, engine) for size, engines in BEST_OF.items() for engine in engines],
    ids=lambda run: f"{run[1]}-{run[0]}ranks",
)

# A head that makes the base far larger than the blocks, so that a copy of it can't hide in a folder's size.
WIDE = {"attention_dropout": 0.2, "vocab_size": 4000}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("model"), **WIDE)


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder):
    """World size -> each rank's findings."""
    return {
        world_size: launch(
            "workers.checkpoints:everything",
            world_size,
            tmp_path_factory.mktemp(f"ranks{world_size}"),
            model=str(model_folder),
            runs=runs,
            best_of=BEST_OF[world_size],
        )
        for world_size, runs in PLANS.items()
    }


@pytest.fixture
def ranks(found, run):
    """Each rank's findings of one run."""
    world_size, *rest = run
    return [rank["resumed"][PLANS[world_size].index(list(rest))] for rank in found[world_size]]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


# -- resume ----------------------------------------------------------------------------------------------------


@each_run
def test_resumed_training_logs_the_same_losses(ranks):
    """Dropout, data order and schedule go on where they were; a loss that is only close means that one doesn't."""
    for rank in ranks:
        straight, resumed = rank["straight"], rank["resumed"]
        assert len(straight["losses"]) == STEPS
        for key in ("losses", "gradient_norms", "learning_rates"):
            assert resumed[key] == straight[key], key


@each_run
def test_resumed_training_ends_with_identical_bits(ranks):
    """Masters, moments, step count and random states: rounding a master to the base's dtype would show here."""
    for rank in ranks:
        straight, resumed = rank["straight"], rank["resumed"]
        assert straight["step"] == resumed["step"] == STEPS
        assert torch.equal(straight["random"], resumed["random"])
        assert set(straight["state"]) == set(resumed["state"]) == set(BLOCKS)
        for module, tensors in straight["state"].items():
            assert set(tensors) == {"delta", "exp_avg", "exp_avg_sq"}
            for name, tensor in tensors.items():
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, resumed["state"][module][name]), f"{name} of {module}"


@each_run
def test_resumed_adapter_is_the_same_file(ranks):
    """What a user keeps of a run that was interrupted must be what the run without interruption gives."""
    folder = Path(ranks[0]["folder"])
    for name in (BLOCKS_FILE, SELECTION_FILE, CONFIG_FILE):
        assert (folder / "again" / name).read_bytes() == (folder / "straight" / name).read_bytes(), name


@each_run
def test_run_was_what_it_claims_to_be(ranks, run):
    """Guards the tests above: the engine, the world size, and that randomness and training really mattered."""
    world_size, engine, dtype = run
    wrapper = {"ddp": "LlamaForCausalLM", "fsdp2": "FSDPLlamaForCausalLM"}.get(engine, "DeepSpeedEngine")
    sharded = "ShardedBlockOptimizer"
    stepper = {"ddp": sharded, "fsdp2": sharded, "zero3": "DeepSpeedZeroOptimizer_Stage3"}.get(
        engine, "DeepSpeedZeroOptimizer"
    )
    if (engine, dtype) == ("zero1", "bfloat16"):
        stepper = "BF16_Optimizer"  # DeepSpeed's choice for stage 1 with fp32 gradients
    for rank in ranks:
        assert rank["world_size"] == world_size
        assert rank["engine"].startswith(wrapper)
        assert rank["engine"].endswith(f", {stepper}")
        before = read_adapter(rank["checkpoint"]).deltas
        for module, tensors in rank["straight"]["state"].items():
            assert not torch.equal(before[module], tensors["delta"])
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


@each_run
def test_newest_checkpoint_is_found(ranks):
    """``--resume_from_checkpoint auto`` would otherwise start anew, over the old run's output."""
    for rank in ranks:
        assert Path(rank["newest"]).name == f"checkpoint-{STEPS}"


@each_run
def test_adapter_is_complete_and_holds_the_masters(ranks, run):
    """Under ZeRO-3 each rank sees a part, or nothing, of a parameter: what is saved must be the whole, unrounded."""
    adapter = read_adapter(Path(ranks[0]["folder"]) / "straight")
    for rank in ranks:
        for module, tensors in rank["straight"]["state"].items():
            assert adapter.deltas[module].shape == (len(BLOCKS[module]) * BLOCK[0], BLOCK[1])
            assert torch.equal(adapter.deltas[module], tensors["delta"])
    if run[2] == "bfloat16":
        assert all((delta != delta.bfloat16().float()).any() for delta in adapter.deltas.values())


@each_run
def test_adapter_is_small(ranks):
    """4 bytes a selected element and a header: anything more is a second copy or a part of the base."""
    path = Path(ranks[0]["folder"]) / "straight" / BLOCKS_FILE
    elements = sum(len(blocks) for blocks in BLOCKS.values()) * BLOCK[0] * BLOCK[1]
    assert 4 * elements < path.stat().st_size <= 4 * elements + 4096


@each_run
def test_adapter_loads_in_another_process(ranks, model_folder):
    """This process trained nothing: the folder alone must be enough, and must change what the model says."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    ids = torch.tensor([make_rows(1)[0]["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        smt_dist.load_adapter(model, Path(ranks[0]["folder"]) / "straight")
        after = model(ids).logits
    assert (after - before).norm() > 1e-2 * before.norm()
    for name, layer in smt_dist.sparse_layers(model).items():
        assert torch.equal(layer.delta, ranks[0]["straight"]["state"][name]["delta"])


# -- the best checkpoint ---------------------------------------------------------------------------------------


@each_best
def test_best_blocks_come_back_at_the_end(found, run):
    """``load_best_model_at_end`` that does nothing hands over the worst model of a run that diverged."""
    world_size, engine = run
    for rank in found[world_size]:
        result = rank["best"][engine]
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


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_method_still_exists_in_trainer(name):
    """A method that transformers renames isn't overridden any more, silently: the base would be in checkpoints."""
    assert name in overridden()
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters)
    for owner in (SMTTrainer, ReselectingTrainer):
        ours = list(inspect.signature(getattr(owner, name)).parameters)
        assert ours in (theirs, ["self", "args", "kwargs"])  # or it hands on whatever it is given


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_override_is_short_and_says_why(name):
    """The work is done elsewhere, where it can be read and tested without Trainer."""
    for owner in (SMTTrainer, ReselectingTrainer):
        if name in vars(owner):
            source = textwrap.dedent(inspect.getsource(vars(owner)[name]))
            (function,) = ast.parse(source).body
            body = function.body[1:] if ast.get_docstring(function) else function.body
            lines = source.splitlines()[body[0].lineno - 1 :]
            assert len([line for line in lines if not line.strip().startswith("#")]) <= 5
            assert "# " in source


def test_list_of_overridden_methods_is_complete():
    """Guards the test above."""
    assert overridden() == set(OVERRIDDEN)
