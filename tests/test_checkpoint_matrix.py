"""A checkpoint of any engine and world size is resumed under any other as if training had gone straight on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from checkpoint_pairs import (
    ENGINE_TYPES,
    LOSSES,
    PAIRS,
    PLAIN,
    QUICK,
    SAVED,
    WORLD_SIZES,
    distance,
    equal_bits,
    tolerance_of,
)
from harness import launch
from safetensors.torch import load_file
from tiers import Check, all_differences, chosen, slow_unless
from workers.checkpoint_matrix import Run, checkpoint_of
from workers.checkpoints import SAVED_AT, STEPS
from workers.runs import engine_arguments
from workers.training import BLOCK, BLOCKS, MULTIPLIERS, fixed_data, make_trainer

from smt_dist.checkpoint.adapter import BLOCKS_FILE, SELECTION_FILE
from smt_dist.checkpoint.training_state import OPTIMIZER_FILE, SCHEDULE_FILE

each_saved = pytest.mark.parametrize(
    "run", slow_unless(SAVED, lambda run: run in [saved for saved, _ in QUICK]), ids=str
)
each_loss = pytest.mark.parametrize(
    "case", slow_unless(LOSSES, lambda case: case[0] == PLAIN), ids=lambda case: f"{case[2]}-{case[1].dtype}"
)
each_pair = pytest.mark.parametrize(
    "pair", slow_unless(PAIRS, lambda pair: pair in QUICK), ids=lambda pair: f"{pair[0]}-to-{pair[1]}"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Where the runs that save leave their checkpoints."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, model_folder, saved):
    """Each rank's findings of a run that goes straight on, and of (saved under, resumed under, what is lost)."""
    results = {}
    resumes = [(*pair, "nothing") for pair in chosen(request, "pair")] + chosen(request, "case")
    saves = list(dict.fromkeys([PLAIN, *(case[0] for case in resumes), *chosen(request, "run")]))
    for size, saving, resuming in launches(saves, resumes):
        straight = [run for run in saves if run.world_size == size and saving]
        resumed = [case for case in resumes if case[1].world_size == size and resuming]
        folder, places = tmp_path_factory.mktemp(f"ranks{size}"), {"model": str(model_folder), "saved": str(saved)}
        runs = {"saves": straight, "resumes": resumed}
        ranks = launch("workers.checkpoint_matrix:train", size, folder, **places, **runs)
        results |= {run: [rank[0][index] for rank in ranks] for index, run in enumerate(straight)}
        results |= {case: [rank[1][index] for rank in ranks] for index, case in enumerate(resumed)}
    return results


def launches(saves: list[Run], resumes: list[tuple]) -> list[tuple[int, bool, bool]]:
    """World size, whether it saves, whether it resumes. The last to save resume in the same processes."""
    *earlier, last = sorted({run.world_size for run in saves})
    others = {case[1].world_size for case in resumes} - {last}
    return [(size, True, False) for size in earlier] + [(last, True, True)] + [(size, False, True) for size in others]


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


# -- at load ---------------------------------------------------------------------------------------------------


@each_pair
def test_at_load_the_state_is_the_files_bit_by_bit(straight, resumed, checkpoint, pair):
    """Read back through the engine before its first step: a rounded master or a moment in the wrong place shows.

    What computes is the masters' rounding: otherwise the first step's gradients would be those of another model.
    """
    masters, moments = (load_file(checkpoint / name) for name in (BLOCKS_FILE, OPTIMIZER_FILE))
    dtype = getattr(torch, pair[1].dtype)
    ranks = resumed[*pair, "nothing"]
    with all_differences() as check:
        for index, at_load in enumerate(rank["at_load"] for rank in ranks):
            with check(f"rank {index}: counters as on rank 0"):
                assert at_load["counters"] == ranks[0]["at_load"]["counters"]
            with check(f"rank {index}: masters"):
                assert equal_bits(at_load["masters"], masters)
            with check(f"rank {index}: moments"):
                assert equal_bits(at_load["moments"], moments)
            with check(f"rank {index}: what computes"):
                computing = {name: tensor.to(dtype) for name, tensor in at_load["computing"].items()}
                assert equal_bits(computing, {name: tensor.to(dtype) for name, tensor in at_load["expected"].items()})
            check_schedule_at_load(check, index, at_load, straight, checkpoint, pair)


def check_schedule_at_load(
    check: Check, index: int, at_load: dict, straight: dict, checkpoint: Path, pair: tuple[Run, Run]
) -> None:
    """Compare counters, which Adam's bias correction needs, and rates, which the next step does."""
    schedule = json.loads((checkpoint / SCHEDULE_FILE).read_text())
    rates = [straight[pair[0]][0]["learning_rates"][SAVED_AT] * multiplier for multiplier in MULTIPLIERS.values()]
    with check(f"rank {index}: step"):
        assert at_load["global_step"] == at_load["counters"]["step"] == SAVED_AT
    with check(f"rank {index}: counters"):
        assert set(at_load["counters"]) == ({"step", "mu_product"} if "NAdam" in pair[0].optim else {"step"})
        # Started over at 1, this one would only show as slightly different steps.
        assert 0 < at_load["counters"].get("mu_product", 0.5) < 1
    with check(f"rank {index}: learning rates"):
        assert at_load["learning_rates"] == schedule["_last_lr"] == pytest.approx(rates, rel=1e-12)
    with check(f"rank {index}: schedule"):
        assert at_load["schedule"].items() <= schedule.items()
        assert at_load["schedule"]["last_epoch"] == SAVED_AT


# -- from there on ---------------------------------------------------------------------------------------------


@each_pair
def test_training_goes_on_as_if_nothing_had_happened(straight, resumed, checkpoint, pair):
    """Data position, schedule, moments and counters: each that is lost makes later losses or norms another run's.

    Equal losses over a few steps can hide a group of blocks that stood still; equal blocks can't.
    """
    expected, ranks = straight[pair[0]][0], resumed[*pair, "nothing"]
    with all_differences() as check:
        for index, rank in enumerate(ranks):
            with check(f"rank {index}: learning rates"):
                assert rank["learning_rates"] == expected["learning_rates"]
            for key in ("losses", "gradient_norms"):
                with check(f"rank {index}: {key}"):
                    assert len(rank[key]) == STEPS
                    assert rank[key] == pytest.approx(expected[key], rel=tolerance_of(key, *pair))
            masters = rank["end"]["masters"]
            with check(f"rank {index}: final blocks"):
                assert distance(masters, expected["end"]["masters"]) <= tolerance_of("masters", *pair)
            with check(f"rank {index}: the same blocks as rank 0"):
                assert equal_bits(masters, ranks[0]["end"]["masters"]), "replicas diverge"
            with check(f"rank {index}: steps"):
                assert rank["end"]["counters"]["step"] == STEPS
        check_claims(check, checkpoint, zip(pair, (straight[pair[0]], ranks), strict=True))


def check_claims(check: Check, checkpoint: Path, runs: Iterable[tuple[Run, list[dict]]]) -> None:
    """Check what is compared: engines, world sizes, accumulation, modules that moved."""
    before = load_file(checkpoint / BLOCKS_FILE)
    for run, ranks in runs:
        kind = ENGINE_TYPES[run.engine if run.world_size > 1 else run.engine.replace("fsdp2", "ddp")]
        if (run.engine, run.dtype) == ("zero1", "bfloat16"):
            kind = "DeepSpeedEngine, BF16_Optimizer"  # DeepSpeed's choice for stage 1 with fp32 gradients
        with check(f"{run}: ranks"):
            assert len(ranks) == run.world_size
        for index, rank in enumerate(ranks):
            with check(f"{run}, rank {index}: engine, world size, accumulation"):
                assert (rank["engine"], rank["world_size"], rank["accumulation"]) == (kind, *run[1:3])
            for module, master in rank["end"]["masters"].items():
                with check(f"{run}, rank {index}: {module} moved"):
                    assert (master - before[module]).abs().amax() > 1e-3
        if run.dtype == "bfloat16":
            with check(f"{run}: masters are finer than bf16"):
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
