"""Re-selection: kept blocks keep every bit, ranks and engines agree, nothing trained is lost, and it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_pairs import ENGINE_TYPES, distance, equal_bits
from harness import launch_engines
from safetensors.torch import load_file
from tiers import all_differences, chosen, engines_of, slow_rows_unless
from transformers import AutoModelForCausalLM
from workers.reselect import EVERY, MIDDLE, STEPS
from workers.training import BLOCK, BLOCKS

import smt_dist
from smt_dist.checkpoint.adapter import ACTIVE_FILE, BLOCKS_FILE, read_adapter
from smt_dist.checkpoint.merge_files import merge_adapter_files
from smt_dist.checkpoint.training_state import OPTIMIZER_FILE

LAUNCHES = {1: ["ddp"], 2: ["ddp", "fsdp2", "zero1", "zero2", "zero3"], 4: ["ddp"]}
KILLED = ["ddp", "zero3"]  # these on two ranks at most
RUNS = [(world_size, engine) for world_size, engines in LAUNCHES.items() for engine in engines]
ALONE = (1, "ddp")
QUICK = [ALONE, (2, "ddp"), (2, "zero3")]
each_run = pytest.mark.parametrize(("world_size", "engine"), slow_rows_unless(RUNS, lambda *run: run in QUICK))
ROWS, TOLERANCE = BLOCK[0], 1e-4


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, model_folder):
    """(world size, engine) -> each rank's findings."""
    folder, asked = tmp_path_factory.mktemp("launches"), {ALONE, *chosen(request, "world_size", "engine")}
    killed = [run[:2] for run in chosen(request, "world_size", "engine", "kind") if run[2] == "before"]
    return {
        run: ranks
        for world_size, engines in engines_of(run for run in RUNS if run in asked).items()
        for run, ranks in launch_engines(
            "workers.reselect:train",
            {world_size: engines},
            folder,
            model=str(model_folder),
            killed=[engine for size, engine in killed if size == world_size],
            timeout=400,
        ).items()
    }


def cut(tensors: dict[str, torch.Tensor], selection: dict[str, list]) -> dict[tuple, torch.Tensor]:
    """(module, row, col) -> the block's values."""
    return {
        (module, *block): tensors[module][index * ROWS : (index + 1) * ROWS]
        for module, blocks in selection.items()
        for index, block in enumerate(blocks)
    }


def blocks_in(text: str) -> dict[str, list]:
    return json.loads(text)["blocks"]


@each_run
def test_kept_blocks_keep_every_bit_and_new_ones_start_at_zero(found, world_size, engine):
    """Masters and moments, read back from the engine after each re-selection, against the checkpoint from before it."""
    for rank in found[world_size, engine]:
        rounds = rank["straight"]["rounds"]
        assert [one["step"] for one in rounds] == [EVERY, 2 * EVERY]
        for one in rounds:
            before = Path(rank["kept"]) / f"checkpoint-{one['step']}"
            old = read_adapter(before)
            old_deltas, old_moments = cut(old.deltas, old.selection.blocks), load_file(before / OPTIMIZER_FILE)
            trained = {(m, *block) for m, blocks in old.trained.blocks.items() for block in blocks}
            masters = cut(one["masters"], blocks_in(one["active"]))
            kept, grown = trained & set(masters), set(masters) - trained
            assert (len(trained), len(kept), len(grown)) == (12, 7, 5)
            assert equal_bits({k: masters[k] for k in kept}, {k: old_deltas[k] for k in kept})
            assert all(torch.equal(masters[key], old_deltas.get(key, torch.zeros(BLOCK))) for key in grown)
            for name in ("exp_avg", "exp_avg_sq"):
                read = {m: one["moments"][f"{m}:{name}"] for m in one["masters"]}
                moments = cut(read, blocks_in(one["active"]))
                old_ones = {m: old_moments[f"{m}:{name}"] for m in old.trained.blocks}
                expected = cut(old_ones, old.trained.blocks)
                assert equal_bits({k: moments[k] for k in kept}, {k: expected[k] for k in kept})
                assert all(moments[key].count_nonzero() == 0 for key in grown)
            assert one["counters"]["step"] == one["step"]


@each_run
def test_dropped_blocks_are_the_weakest_and_go_on_computing_as_they_were(found, world_size, engine):
    """A dropped block's training mustn't be lost, and the strongest mustn't be the ones that go."""
    for rank in found[world_size, engine]:
        for one in rank["straight"]["rounds"]:
            old = read_adapter(Path(rank["kept"]) / f"checkpoint-{one['step']}")
            deltas = cut(old.deltas, old.selection.blocks)
            frozen = cut(one["frozen"], one["frozen_blocks"])
            active = set(cut(one["masters"], blocks_in(one["active"])))
            assert equal_bits(frozen, {key: deltas[key] for key in frozen})
            for is_mlp in (False, True):
                own = [(m, *b) for m, bs in old.trained.blocks.items() for b in bs if (".mlp." in m) == is_mlp]
                magnitude = {key: deltas[key].abs().mean().item() for key in own}
                gone = [magnitude[key] for key in own if key not in active]
                assert len(gone) == len(own) // 2
                assert max(gone) <= min(magnitude[key] for key in own if key in active)


@each_run
def test_the_adapter_holds_all_blocks_ever_trained(found, world_size, engine):
    """Without the frozen ones, the merged model would be another than the trained one."""
    for rank in found[world_size, engine]:
        run = rank["straight"]
        adapter = read_adapter(run["output"])
        ever_trained = {(m, *block) for m, blocks in adapter.selection.blocks.items() for block in blocks}
        ever = {(m, *block) for m, blocks in BLOCKS.items() for block in blocks}
        for one in run["rounds"]:
            ever |= set(cut(one["masters"], blocks_in(one["active"])))
        assert ever_trained == ever
        assert 12 < len(ever_trained) <= 22
        assert adapter.active.step == 2 * EVERY
        assert adapter.trained.to_json() == run["end"]["active"]
        values = cut(adapter.deltas, adapter.selection.blocks)
        masters = cut(run["end"]["masters"], blocks_in(run["end"]["active"]))
        assert equal_bits({key: values[key] for key in masters}, masters)
        frozen = cut(run["end"]["frozen"], run["end"]["frozen_blocks"])
        assert equal_bits({key: values[key] for key in frozen}, frozen)
        assert set(masters) | set(frozen) == ever_trained
        assert all(value.count_nonzero() for value in masters.values()), "a block that grew was never trained"


@each_run
def test_world_size_and_engine_change_nothing(found, world_size, engine):
    """The same blocks by name at each re-selection; values and losses up to the order of sums."""
    alone = found[ALONE][0]["straight"]
    with all_differences() as check:
        with check("ranks"):
            assert len(found[world_size, engine]) == world_size
        for index, rank in enumerate(found[world_size, engine]):
            run = rank["straight"]
            with check(f"rank {index}: blocks of each round"):
                assert [one["active"] for one in run["rounds"]] == [one["active"] for one in alone["rounds"]]
            with check(f"rank {index}: blocks ever trained"):
                assert run["end"]["ever_trained"] == alone["end"]["ever_trained"]
            with check(f"rank {index}: losses"):
                assert len(run["losses"]) == STEPS
                assert run["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
            with check(f"rank {index}: final blocks"):
                assert distance(run["end"]["masters"], alone["end"]["masters"]) < TOLERANCE
            with check(f"rank {index}: the loss is of all rounds"):
                assert run["loss"] == pytest.approx(sum(run["losses"]) / STEPS, rel=1e-3)
            for kind in {"straight", "middle", "before"} & set(rank):
                with check(f"rank {index}, {kind}: it was what it claims to be"):
                    assert (rank[kind]["world_size"], rank[kind]["engine"]) == (world_size, ENGINE_TYPES[engine])
                    assert rank[kind]["trainable"] == 0, "something beside the blocks is trained"


@pytest.mark.parametrize(
    ("world_size", "engine", "kind"),
    slow_rows_unless(
        [(*run, "middle") for run in RUNS] + [(*run, "before") for run in RUNS if run[0] < 4 and run[1] in KILLED],
        lambda *run: run[:2] in QUICK,
    ),
)
def test_a_killed_run_goes_on_bit_by_bit(found, world_size, engine, kind):
    """From the middle of a round, and from a checkpoint whose re-selection was still to be made."""
    for rank in found[world_size, engine]:
        straight, resumed = rank["straight"], rank[kind]
        assert [one["step"] for one in resumed["rounds"]] == (
            [MIDDLE, 2 * EVERY] if kind == "middle" else [EVERY, 2 * EVERY]
        )
        assert resumed["end"]["active"] == straight["end"]["active"]
        assert resumed["end"]["ever_trained"] == straight["end"]["ever_trained"]
        tolerance = 0 if world_size < 4 else 1e-6  # gloo's sums on four ranks may differ in the last bit
        assert resumed["losses"] == pytest.approx(straight["losses"], rel=tolerance)
        assert distance(resumed["end"]["masters"], straight["end"]["masters"]) <= tolerance
        files = [load_file(Path(run["output"]) / BLOCKS_FILE) for run in (straight, resumed)]
        assert tolerance or equal_bits(*files)


def test_the_reselected_adapter_loads_computes_and_merges_as_it_was_trained(found, model_folder, tmp_path):
    """Frozen blocks are ordinary blocks of the adapter: for inference, for merging, and for going on."""
    run = found[ALONE][0]["straight"]
    ids = torch.arange(3, 23)[None]

    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids).logits

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    before = logits(model)
    adapter = smt_dist.load_adapter(model, run["output"])
    loaded = logits(model)
    assert not torch.allclose(loaded, before, atol=1e-3)
    smt_dist.remove_blocks(model)
    smt_dist.checkpoint.adapter.attach_adapter(model, adapter)
    torch.testing.assert_close(logits(model), loaded)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{module}.delta" for module in adapter.trained.blocks}
    with smt_dist.blocks_disabled(model):
        assert torch.equal(logits(model), before)
    smt_dist.save_adapter(model, tmp_path / "again")
    for name in (BLOCKS_FILE, ACTIVE_FILE, "smt_selection.json"):
        assert (tmp_path / "again" / name).read_bytes() == (Path(run["output"]) / name).read_bytes()
    smt_dist.merge_blocks(model)
    torch.testing.assert_close(logits(model), loaded)
    smt_dist.unmerge_blocks(model)
    torch.testing.assert_close(logits(model), loaded)
    smt_dist.remove_blocks(model)
    assert torch.equal(logits(model), before)
    merge_adapter_files(model_folder, run["output"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), loaded)
