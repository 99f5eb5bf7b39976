"""A checkpoint of any engine and world size is resumed under any other as if training had gone straight on."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from harness import launch
from safetensors.torch import load_file
from workers.checkpoint_matrix import Run, checkpoint_of
from workers.checkpoints import SAVED_AT, STEPS
from workers.runs import engine_arguments
from workers.training import BLOCK, BLOCKS, MULTIPLIERS, fixed_data, make_trainer

from smt_dist.checkpoint.adapter import BLOCKS_FILE, SELECTION_FILE
from smt_dist.checkpoint.training_state import OPTIMIZER_FILE, SCHEDULE_FILE

TOLERANCE = 1e-5
# Numbers of bf16 lie up to 2^-7 of their size apart. Activations and single gradients differ by that where another
# number of rows makes sums run in another order, and Adam hands it on: twice as much is granted to norms and blocks,
# half to losses, which average over tokens. With as many rows a micro-batch nothing differs, and fp32's tolerance
# holds. The state itself is fp32 and compared bit by bit at load.
BF16_TOLERANCES = {"losses": 2**-8, "gradient_norms": 2**-6, "masters": 2**-6}
BF16, NADAM = {"dtype": "bfloat16"}, {"optim": "torch.optim.NAdam"}

# (saved under, resumed under)
PAIRS = [
    (Run("ddp", 1), Run("zero3", 2)),
    (Run("fsdp2", 1), Run("zero1", 4)),
    (Run("zero1", 1), Run("fsdp2", 1)),
    (Run("ddp", 2, accumulation=2), Run("fsdp2", 4)),
    (Run("fsdp2", 2), Run("ddp", 1)),
    (Run("hsdp", 2), Run("zero2", 1)),
    (Run("zero1", 2), Run("hsdp", 4)),
    (Run("zero2", 2), Run("fsdp2", 2)),
    (Run("zero3", 2), Run("ddp", 2, accumulation=2)),
    (Run("fsdp2", 4), Run("zero1", 2)),
    (Run("hsdp", 4), Run("zero3", 4)),
    (Run("zero2", 4), Run("ddp", 2)),
    (Run("zero3", 4), Run("zero2", 2)),
    (Run("fsdp2", 2, **BF16), Run("zero1", 2, **BF16)),
    (Run("zero1", 2, **BF16), Run("fsdp2", 4, **BF16)),
    (Run("zero3", 2, **BF16), Run("zero2", 1, **BF16)),
    (Run("ddp", 2, **NADAM), Run("fsdp2", 1, **NADAM)),
    (Run("ddp", 2, **NADAM), Run("zero2", 2, **NADAM)),
]
SAVED = list(dict.fromkeys(saved for saved, _ in PAIRS))
PLAIN = Run("ddp", 1)
# (saved under, resumed under, what is lost on the way)
LOSSES = [
    (PLAIN, PLAIN, "data"),
    (PLAIN, PLAIN, "moments"),
    (Run("zero3", 2, **BF16), Run("ddp", 1, **BF16), "data"),
    (Run("zero3", 2, **BF16), Run("ddp", 1, **BF16), "moments"),
]
WORLD_SIZES = (1, 2, 4)
# (world size, saves, resumes). Four ranks resume in the processes in which they have just saved: they start slowest.
LAUNCHES = [(1, True, False), (2, True, False), (4, True, True), (2, False, True), (1, False, True)]
each_saved = pytest.mark.parametrize("run", SAVED, ids=str)
each_loss = pytest.mark.parametrize("case", LOSSES, ids=lambda case: f"{case[2]}-{case[1].dtype}")
each_pair = pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0]}-to-{pair[1]}")

ZERO = "DeepSpeedEngine, DeepSpeedZeroOptimizer"
ENGINE_TYPES = {
    "ddp": "LlamaForCausalLM, ShardedBlockOptimizer",
    "fsdp2": "FSDPLlamaForCausalLM, ShardedBlockOptimizer",
    "hsdp": "FSDPLlamaForCausalLM, ShardedBlockOptimizer",
    "zero1": ZERO,
    "zero2": ZERO,
    "zero3": f"{ZERO}_Stage3",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where the runs that save leave their checkpoints."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder, saved):
    """Each rank's findings of a run that goes straight on, and of (saved under, resumed under, what is lost)."""
    results = {}
    resumes = [(*pair, "nothing") for pair in PAIRS] + LOSSES
    for size, saving, resuming in LAUNCHES:
        straight = [run for run in SAVED if run.world_size == size and saving]
        resumed = [case for case in resumes if case[1].world_size == size and resuming]
        folder, places = tmp_path_factory.mktemp(f"ranks{size}"), {"model": str(model_folder), "saved": str(saved)}
        runs = {"saves": straight, "resumes": resumed}
        ranks = launch("workers.checkpoint_matrix:train", size, folder, **places, **runs)
        results |= {run: [rank[0][index] for rank in ranks] for index, run in enumerate(straight)}
        results |= {case: [rank[1][index] for rank in ranks] for index, case in enumerate(resumed)}
    return results


@pytest.fixture(scope="module")
def straight(found):
    """Run -> each rank's findings of saving a checkpoint and going straight on."""
    return {key: ranks for key, ranks in found.items() if isinstance(key, Run)}


@pytest.fixture(scope="module")
def resumed(found):
    """(saved under, resumed under, what is lost) -> each rank's findings."""
    return {key: ranks for key, ranks in found.items() if not isinstance(key, Run)}


@pytest.fixture(scope="module")
def checkpoints(straight, saved) -> dict[Run, Path]:
    """What each run has saved."""
    return {run: checkpoint_of(saved, run) for run in straight}


@pytest.fixture
def checkpoint(checkpoints, pair) -> Path:
    return checkpoints[pair[0]]


def equal_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Not only equal numbers: -0.0 isn't 0.0 here."""
    return set(actual) == set(expected) and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
        for name, tensor in actual.items()
    )


def distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The relative norm of the difference of all blocks."""
    ours, theirs = (torch.cat([blocks[name].flatten() for name in sorted(expected)]) for blocks in (actual, expected))
    return float((ours - theirs).norm() / theirs.norm())


def tolerance_of(key: str, *pair: Run) -> float:
    """What rounding explains of the difference between a resumed run and the straight one."""
    micro_batches = {run.world_size * run.accumulation for run in pair}
    return BF16_TOLERANCES[key] if pair[0].dtype == "bfloat16" and len(micro_batches) > 1 else TOLERANCE


# -- at load ---------------------------------------------------------------------------------------------------


@each_pair
def test_state_at_load_is_the_files_bit_by_bit(resumed, checkpoint, pair):
    """Read back through the engine before its first step: a rounded master or a moment in the wrong place shows."""
    masters, moments = (load_file(checkpoint / name) for name in (BLOCKS_FILE, OPTIMIZER_FILE))
    for rank in resumed[*pair, "nothing"]:
        assert equal_bits(rank["at_load"]["masters"], masters)
        assert equal_bits(rank["at_load"]["moments"], moments)


@each_pair
def test_what_computes_at_load_is_the_masters_rounding(resumed, checkpoint, pair):
    """Otherwise the first step's gradients would be those of another model, and no master would show it."""
    dtype = getattr(torch, pair[1].dtype)
    masters = {name: tensor.to(dtype) for name, tensor in load_file(checkpoint / BLOCKS_FILE).items()}
    for rank in resumed[*pair, "nothing"]:
        computing = {name: tensor.to(dtype) for name, tensor in rank["at_load"]["computing"].items()}
        assert equal_bits(computing, masters)


@each_pair
def test_counters_and_schedule_go_on_at_load(straight, resumed, checkpoint, pair):
    """Adam's bias correction starts over without its step count, and the first step needs its rate already."""
    schedule = json.loads((checkpoint / SCHEDULE_FILE).read_text())
    rates = [straight[pair[0]][0]["learning_rates"][SAVED_AT] * multiplier for multiplier in MULTIPLIERS.values()]
    for rank in resumed[*pair, "nothing"]:
        at_load = rank["at_load"]
        assert at_load["global_step"] == at_load["counters"]["step"] == SAVED_AT
        assert set(at_load["counters"]) == ({"step", "mu_product"} if "NAdam" in pair[0].optim else {"step"})
        assert at_load["learning_rates"] == schedule["_last_lr"] == pytest.approx(rates, rel=1e-12)
        assert at_load["schedule"].items() <= schedule.items()
        assert at_load["schedule"]["last_epoch"] == SAVED_AT


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "NAdam" in pair[0].optim], ids=lambda pair: str(pair[1]))
def test_running_product_of_nadam_goes_on(resumed, pair):
    """A counter that is no step count: started over at 1, it would only show as slightly different steps."""
    (found,) = {rank["at_load"]["counters"]["mu_product"] for rank in resumed[*pair, "nothing"]}
    assert 0 < found < 1


# -- from there on ---------------------------------------------------------------------------------------------


@each_pair
def test_training_goes_on_as_if_nothing_had_happened(straight, resumed, pair):
    """Data position, schedule, moments and counters: each that is lost makes later losses or norms another run's."""
    expected = straight[pair[0]][0]
    for rank in resumed[*pair, "nothing"]:
        assert rank["learning_rates"] == expected["learning_rates"]
        for key in ("losses", "gradient_norms"):
            assert len(rank[key]) == STEPS
            assert rank[key] == pytest.approx(expected[key], rel=tolerance_of(key, *pair)), key


@each_pair
def test_final_blocks_equal_those_of_the_straight_run(straight, resumed, pair):
    """Equal losses over a few steps can hide a group of blocks that stood still."""
    expected = straight[pair[0]][0]["end"]["masters"]
    for rank in resumed[*pair, "nothing"]:
        assert distance(rank["end"]["masters"], expected) <= tolerance_of("masters", *pair)
        assert equal_bits(rank["end"]["masters"], resumed[*pair, "nothing"][0]["end"]["masters"]), "ranks drift apart"
        assert rank["end"]["counters"]["step"] == STEPS


@each_pair
def test_runs_were_what_they_claim_to_be(straight, resumed, checkpoint, pair):
    """Guards the tests above: engines, world sizes, accumulation, and that every module moved after resuming."""
    before = load_file(checkpoint / BLOCKS_FILE)
    for run, ranks in zip(pair, (straight[pair[0]], resumed[*pair, "nothing"]), strict=True):
        kind = ENGINE_TYPES[run.engine if run.world_size > 1 else run.engine.replace("fsdp2", "ddp")]
        if (run.engine, run.dtype) == ("zero1", "bfloat16"):
            kind = "DeepSpeedEngine, BF16_Optimizer"  # DeepSpeed's choice for stage 1 with fp32 gradients
        assert len(ranks) == run.world_size
        for rank in ranks:
            assert (rank["engine"], rank["world_size"], rank["accumulation"]) == (kind, *run[1:3])
            for module, master in rank["end"]["masters"].items():
                assert (master - before[module]).abs().amax() > 1e-3, module
    if pair[0].dtype == "bfloat16":
        assert all((master != master.bfloat16().float()).any() for master in before.values())


@each_loss
def test_what_is_lost_shows(straight, resumed, case):
    """Guards the tests above: lost moments or a lost position in the data must be more than their tolerance."""
    (found,), expected = resumed[case], straight[case[0]][0]
    losses, tolerance = expected["losses"][SAVED_AT:], tolerance_of("losses", *case[:2])
    assert found["losses"][SAVED_AT:] != pytest.approx(losses, rel=tolerance)
    assert distance(found["end"]["masters"], expected["end"]["masters"]) > 4 * tolerance_of("masters", *case[:2])


def test_matrix_holds_every_engine_on_both_sides_and_every_change_of_size():
    """Guards the tests above: the matrix is the promise."""
    engines = {"ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"}
    plain = [pair for pair in PAIRS if {run.dtype for run in pair} == {"float32"} and pair[0].optim == "adamw_torch"]
    assert len(plain) >= 10
    for side in zip(*plain, strict=True):
        assert {run.engine for run in side} == engines
        assert {run.world_size for run in side} == set(WORLD_SIZES)
    changes = [resumed.world_size - saved.world_size for saved, resumed in plain]
    assert min(changes) < 0 < max(changes)
    assert 0 in changes
    assert all(saved.engine != resumed.engine for saved, resumed in plain)


# -- what is on disk -------------------------------------------------------------------------------------------


def shapes_of(path: Path) -> dict[str, tuple]:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in load_file(path).items()}


@each_saved
def test_all_engines_write_one_format(checkpoints, run):
    """A file, tensor or key that only one engine writes is one that another will miss."""
    folder, pattern = checkpoints[run], checkpoints[PLAIN]
    ranks = {f"rng_state_{rank}.json" for rank in range(run.world_size)}
    shared = {path.name for path in pattern.iterdir()} - {"rng_state_0.json"}
    assert {path.name for path in folder.iterdir()} == shared | ranks
    for name in (BLOCKS_FILE, OPTIMIZER_FILE):
        assert shapes_of(folder / name) == shapes_of(pattern / name)
    blocks = {name: (torch.float32, (len(cells) * BLOCK[0], BLOCK[1])) for name, cells in BLOCKS.items()}
    assert shapes_of(folder / BLOCKS_FILE) == blocks
    assert (folder / SELECTION_FILE).read_bytes() == (pattern / SELECTION_FILE).read_bytes()
    assert json.loads((folder / SCHEDULE_FILE).read_text()) == json.loads((pattern / SCHEDULE_FILE).read_text())


@each_saved
def test_checkpoint_is_written_tensor_by_tensor(straight, run):
    """No rank, writing or only reading along, may hold more than one master, or more than one block's moments."""
    for rank in straight[run]:
        assert rank["alive"]["masters"] == 1
        assert rank["alive"]["moments"] == 2
        assert rank["alive"]["hoarded"] == len(BLOCKS), "the count has to see tensors that are kept"


# -- another batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 4])
def test_other_global_batch_is_named(tmp_path, model_folder, caplog, rows):
    """Steps done count as steps of the new size, so data and schedule go on elsewhere: silently, nobody would know."""
    with engine_arguments("ddp", tmp_path, max_steps=1, save_strategy="steps", save_steps=1) as args:
        make_trainer(str(model_folder), args, fixed_data()).train()
    with engine_arguments("ddp", tmp_path / "on", max_steps=2, per_device_train_batch_size=rows) as args:
        trainer = make_trainer(str(model_folder), args, fixed_data())
        caplog.clear()
        with caplog.at_level(logging.WARNING, "smt_dist"):
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    said = [record.getMessage() for record in caplog.records if "rows a step" in record.getMessage()]
    assert len(said) == (rows != 8)
    assert all("8 rows a step, now it is 4" in message for message in said)
