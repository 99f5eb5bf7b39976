"""Re-selection: kept blocks keep every bit, ranks and engines agree, nothing trained is lost, and it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import launch_engines
from safetensors.torch import load_file
from test_checkpoint_matrix import ENGINE_TYPES, distance, equal_bits
from test_selection import make_scores
from transformers import AutoModelForCausalLM
from workers.reselect import EVERY, MIDDLE, STEPS
from workers.training import BLOCK, BLOCKS

import smt_dist
from smt_dist import BlockSelection, SMTConfig
from smt_dist.adapter import ACTIVE_FILE, BLOCKS_FILE, read_adapter
from smt_dist.blocks import BlockGrid
from smt_dist.checkpoint import OPTIMIZER_FILE
from smt_dist.exchange import exchange
from smt_dist.merge_files import merge_adapter_files
from smt_dist.reselect import first_steps_factor

LAUNCHES = {1: ["ddp"], 2: ["ddp", "fsdp2", "zero1", "zero2", "zero3"], 4: ["ddp"]}
KILLED = ["ddp", "zero3"]  # these on two ranks at most
RUNS = [(world_size, engine) for world_size, engines in LAUNCHES.items() for engine in engines]
each_run = pytest.mark.parametrize(("world_size", "engine"), RUNS)
ROWS, TOLERANCE = BLOCK[0], 1e-4


@pytest.fixture(scope="module")
def found(tmp_path_factory, model_folder):
    """(world size, engine) -> each rank's findings."""
    folder = tmp_path_factory.mktemp("launches")
    return {
        run: ranks
        for world_size, engines in LAUNCHES.items()
        for run, ranks in launch_engines(
            "workers.reselect:train",
            {world_size: engines},
            folder,
            model=str(model_folder),
            killed=KILLED if world_size < 4 else [],
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
    """Masters and moments, read back from the engine after each exchange, against the checkpoint from before it."""
    for rank in found[world_size, engine]:
        phases = rank["straight"]["phases"]
        assert [phase["step"] for phase in phases] == [EVERY, 2 * EVERY]
        for phase in phases:
            before = Path(rank["kept"]) / f"checkpoint-{phase['step']}"
            old = read_adapter(before)
            old_deltas, old_moments = cut(old.deltas, old.selection.blocks), load_file(before / OPTIMIZER_FILE)
            trained = {(m, *block) for m, blocks in old.trained.blocks.items() for block in blocks}
            masters = cut(phase["masters"], blocks_in(phase["active"]))
            kept, grown = trained & set(masters), set(masters) - trained
            assert (len(trained), len(kept), len(grown)) == (12, 7, 5)
            assert equal_bits({k: masters[k] for k in kept}, {k: old_deltas[k] for k in kept})
            assert all(torch.equal(masters[key], old_deltas.get(key, torch.zeros(BLOCK))) for key in grown)
            for name in ("exp_avg", "exp_avg_sq"):
                read = {m: phase["moments"][f"{m}:{name}"] for m in phase["masters"]}
                moments = cut(read, blocks_in(phase["active"]))
                old_ones = {m: old_moments[f"{m}:{name}"] for m in old.trained.blocks}
                expected = cut(old_ones, old.trained.blocks)
                assert equal_bits({k: moments[k] for k in kept}, {k: expected[k] for k in kept})
                assert all(moments[key].count_nonzero() == 0 for key in grown)
            assert phase["counters"]["step"] == phase["step"]


@each_run
def test_dropped_blocks_are_the_weakest_and_go_on_computing_as_they_were(found, world_size, engine):
    """A dropped block's training mustn't be lost, and the strongest mustn't be the ones that go."""
    for rank in found[world_size, engine]:
        for phase in rank["straight"]["phases"]:
            old = read_adapter(Path(rank["kept"]) / f"checkpoint-{phase['step']}")
            deltas = cut(old.deltas, old.selection.blocks)
            frozen = cut(phase["frozen"], phase["frozen_blocks"])
            active = set(cut(phase["masters"], blocks_in(phase["active"])))
            assert equal_bits(frozen, {key: deltas[key] for key in frozen})
            for is_mlp in (False, True):
                own = [(m, *b) for m, bs in old.trained.blocks.items() for b in bs if (".mlp." in m) == is_mlp]
                strength = {key: deltas[key].abs().mean().item() for key in own}
                gone = [strength[key] for key in own if key not in active]
                assert len(gone) == len(own) // 2
                assert max(gone) <= min(strength[key] for key in own if key in active)


@each_run
def test_the_adapter_holds_all_blocks_ever_touched(found, world_size, engine):
    """Without the frozen ones, the merged model would be another than the trained one."""
    for rank in found[world_size, engine]:
        run = rank["straight"]
        adapter = read_adapter(run["output"])
        touched = {(m, *block) for m, blocks in adapter.selection.blocks.items() for block in blocks}
        ever = {(m, *block) for m, blocks in BLOCKS.items() for block in blocks}
        for phase in run["phases"]:
            ever |= set(cut(phase["masters"], blocks_in(phase["active"])))
        assert touched == ever
        assert 12 < len(touched) <= 22
        assert adapter.active.step == 2 * EVERY
        assert adapter.trained.to_json() == run["end"]["active"]
        values = cut(adapter.deltas, adapter.selection.blocks)
        masters = cut(run["end"]["masters"], blocks_in(run["end"]["active"]))
        assert equal_bits({key: values[key] for key in masters}, masters)
        frozen = cut(run["end"]["frozen"], run["end"]["frozen_blocks"])
        assert equal_bits({key: values[key] for key in frozen}, frozen)
        assert set(masters) | set(frozen) == touched
        assert all(value.count_nonzero() for value in masters.values()), "a block that grew was never trained"


@each_run
def test_world_size_and_engine_change_nothing(found, world_size, engine):
    """The same blocks by name at each exchange; values and losses up to the order of sums."""
    alone = found[1, "ddp"][0]["straight"]
    for rank in found[world_size, engine]:
        run = rank["straight"]
        assert [phase["active"] for phase in run["phases"]] == [phase["active"] for phase in alone["phases"]]
        assert run["end"]["touched"] == alone["end"]["touched"]
        assert len(run["losses"]) == STEPS
        assert run["losses"] == pytest.approx(alone["losses"], rel=TOLERANCE)
        assert distance(run["end"]["masters"], alone["end"]["masters"]) < TOLERANCE
        assert run["loss"] == pytest.approx(sum(run["losses"]) / STEPS, rel=1e-3), "the loss is of all phases"


@pytest.mark.parametrize(
    ("world_size", "engine", "kind"),
    [(*run, "middle") for run in RUNS] + [(*run, "before") for run in RUNS if run[0] < 4 and run[1] in KILLED],
)
def test_a_killed_run_goes_on_bit_by_bit(found, world_size, engine, kind):
    """From the middle of a phase, and from a checkpoint whose exchange was still to be made."""
    for rank in found[world_size, engine]:
        straight, resumed = rank["straight"], rank[kind]
        assert [phase["step"] for phase in resumed["phases"]] == (
            [MIDDLE, 2 * EVERY] if kind == "middle" else [EVERY, 2 * EVERY]
        )
        assert resumed["end"]["active"] == straight["end"]["active"]
        assert resumed["end"]["touched"] == straight["end"]["touched"]
        tolerance = 0 if world_size < 4 else 1e-6  # gloo's sums on four ranks may differ in the last bit
        assert resumed["losses"] == pytest.approx(straight["losses"], rel=tolerance)
        assert distance(resumed["end"]["masters"], straight["end"]["masters"]) <= tolerance
        files = [load_file(Path(run["output"]) / BLOCKS_FILE) for run in (straight, resumed)]
        assert tolerance or equal_bits(*files)


@each_run
def test_runs_were_what_they_claim_to_be(found, world_size, engine):
    """Guards the tests above."""
    assert len(found[world_size, engine]) == world_size
    for rank in found[world_size, engine]:
        for run in (rank[kind] for kind in ("straight", "middle", "before") if kind in rank):
            assert (run["world_size"], run["engine"]) == (world_size, ENGINE_TYPES[engine])
            assert run["trainable"] == 0, "something beside the blocks is trained"


def test_the_reselected_adapter_loads_computes_and_merges_as_it_was_trained(found, model_folder, tmp_path):
    """Frozen blocks are ordinary blocks of the adapter: for inference, for merging, and for going on."""
    run = found[1, "ddp"][0]["straight"]
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
    smt_dist.adapter.attach_adapter(model, adapter, "a", adapter.config, torch.float32, train_active=True)
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


# -- the exchange itself -----------------------------------------------------------------------------------------


def reselect_config(*groups: dict, **selection) -> SMTConfig:
    named = [{"name": "g", **group} for group in groups]
    return SMTConfig.model_validate({"block_size": 4, "groups": named, "selection": {"score": "l1", **selection}})


def test_the_weakest_go_and_the_best_of_the_rest_grow():
    """By hand: of 4 trained blocks the 2 weakest; a dropped block can't come back at once, however good its score."""
    scores = make_scores({"a": [[9, 1, 8, 2]], "b": [[7, 3, 6, 99]]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1)], "b": [(0, 0), (0, 3)]})
    strengths = {"a": {(0, 0): 0.4, (0, 1): 0.3}, "b": {(0, 0): 0.2, (0, 3): 0.1}}
    changed = exchange(scores, active, strengths, reselect_config({"blocks": 4}), 0.5)
    assert changed.blocks == {"a": [(0, 0), (0, 1), (0, 2)], "b": [(0, 2)]}


def test_of_equally_weak_blocks_the_last_goes():
    """Blocks that never got a gradient are all at zero: any other rule would differ between ranks."""
    scores = make_scores({"a": [[0, 0, 5, 5]]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1)]})
    strengths = {"a": {(0, 0): 0.0, (0, 1): 0.0}}
    assert exchange(scores, active, strengths, reselect_config({"blocks": 2}), 0.5).blocks == {"a": [(0, 0), (0, 2)]}


def test_no_more_are_dropped_than_can_grow():
    """At a budget near all blocks, dropping more would train less than the budget."""
    scores = make_scores({"a": [[1, 2, 3, 4]]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1), (0, 2)]})
    strengths = {"a": {(0, 0): 3.0, (0, 1): 1.0, (0, 2): 2.0}}
    assert exchange(scores, active, strengths, reselect_config({"blocks": 3}), 1.0).blocks == {
        "a": [(0, 0), (0, 2), (0, 3)]
    }


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({}, {"layers.0.q": 2}),
        ({"floor": 1}, {"layers.0.q": 1, "layers.1.q": 1}),
        ({"strategy": "norm_dist"}, {"layers.0.q": 1, "layers.1.q": 1}),
    ],
    ids=str,
)
def test_bounds_and_strategy_hold_after_an_exchange(selection, expected):
    """A floor that holds until step 100 only is none."""
    scores = make_scores({"layers.0.q": [[9, 8, 7]], "layers.1.q": [[3, 2, 1]]})
    active = BlockSelection(block_size=(4, 4), blocks={"layers.0.q": [(0, 0)], "layers.1.q": [(0, 0)]})
    strengths = {"layers.0.q": {(0, 0): 2.0}, "layers.1.q": {(0, 0): 1.0}}
    changed = exchange(scores, active, strengths, reselect_config({"blocks": 2}, **selection), 0.5)
    assert {module: len(blocks) for module, blocks in changed.blocks.items()} == expected


@pytest.mark.parametrize(
    ("selection", "gone"),
    [
        ({"floor": 2}, ("layers.1.q", (0, 0))),
        ({"strategy": "norm_dist"}, ("layers.1.q", (0, 0))),
        ({"ceiling": 2}, ("layers.1.q", (0, 0))),
        ({}, ("layers.0.q", (0, 1))),
    ],
    ids=str,
)
def test_a_block_that_bounds_need_is_not_dropped(selection, gone):
    """Layer 0 has two blocks, and two are asked of each layer: without one, the run would end in the middle."""
    scores = make_scores({"layers.0.q": [[9, 8]], "layers.1.q": [[3, 2, 1]]})
    active = BlockSelection(block_size=(4, 4), blocks={"layers.0.q": [(0, 0), (0, 1)], "layers.1.q": [(0, 0), (0, 1)]})
    strengths = {"layers.0.q": {(0, 0): 9.0, (0, 1): 1.0}, "layers.1.q": {(0, 0): 2.0, (0, 1): 3.0}}
    changed = exchange(scores, active, strengths, reselect_config({"blocks": 4}, **selection), 0.25)
    left = {(module, block) for module, blocks in changed.blocks.items() for block in blocks}
    assert left == {
        *(("layers.0.q", (0, col)) for col in (0, 1)), *(("layers.1.q", (0, col)) for col in (0, 1, 2))
    } - {gone}  # fmt: skip


def test_blocks_outside_of_the_targets_stay():
    """A selection by hand may hold some; they have no score to be compared by."""
    scores = make_scores({"a": [[1, 2]]})
    active = BlockSelection(block_size=(4, 4), blocks={"other": [(0, 0)], "a": [(0, 0)]}, groups={"other": "h"})
    strengths = {"other": {(0, 0): 0.0}, "a": {(0, 0): 1.0}}
    changed = exchange(scores, active, strengths, reselect_config({"blocks": 1}), 1.0)
    assert changed.blocks == {"a": [(0, 1)], "other": [(0, 0)]}
    assert changed.groups == {"a": "g", "other": "h"}
    alone = BlockSelection(block_size=(4, 4), blocks={"other": [(0, 0)]})
    with pytest.raises(smt_dist.SMTError, match="no trained block lies in a target"):
        exchange(scores, alone, strengths, reselect_config({"blocks": 1}), 1.0)


def test_budgets_of_groups_stay_apart_unless_they_are_joint():
    """Each group gives as many as it gets; jointly the better one grows."""
    scores = make_scores({"a": [[1, 2, 3]], "b": [[70, 80, 90]]}, {"x": ["a"], "y": ["b"]})
    active = BlockSelection(block_size=(4, 4), blocks={"a": [(0, 0), (0, 1)], "b": [(0, 0)]})
    strengths = {"a": {(0, 0): 2.0, (0, 1): 1.0}, "b": {(0, 0): 3.0}}
    groups = ({"name": "x", "blocks": 2}, {"name": "y", "blocks": 1})
    apart = exchange(scores, active, strengths, reselect_config(*groups), 0.5)
    assert apart.blocks == {"a": [(0, 0), (0, 2)], "b": [(0, 0)]}
    joint = exchange(scores, active, strengths, reselect_config(*groups, budget="joint"), 0.5)
    assert joint.blocks == {"a": [(0, 0)], "b": [(0, 0), (0, 2)]}
    assert joint.groups == {"a": "x", "b": "y"}


def test_the_warning_of_long_first_steps_is_what_adam_does():
    """Adam from zero moments at step 10,000, against Adam at rest under the same constant gradient."""
    for beta2 in (0.999, 0.95):
        parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
        optimizer = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, beta2), eps=1e-30)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = optimizer.state[parameter]
        state["step"].fill_(10_000)
        state["exp_avg"].copy_(torch.tensor([0.0, 1.0]))
        state["exp_avg_sq"].copy_(torch.tensor([0.0, 1.0]))
        longest = 0.0
        for _ in range(100):
            before = parameter.detach().clone()
            optimizer.step()
            new, rest = (before - parameter.detach()).tolist()
            longest = max(longest, new / rest)
        assert longest == pytest.approx(first_steps_factor(0.9, beta2), rel=1e-3)


@pytest.mark.parametrize(
    ("plan", "named"),
    [
        ({"every": 0, "fraction": 0.1}, "reselect.every"),
        ({"every": 5, "fraction": 0}, "reselect.fraction"),
        ({"every": 5, "fraction": 1.5}, "reselect.fraction"),
        ({"every": 5}, "reselect.fraction"),
        ({"every": 5, "fraction": 0.1, "steps": 0}, "reselect.steps"),
        ({"every": 5, "fraction": 0.1, "score": "random"}, "reselect.score: expected one of abs_mean"),
        ({"every": 5, "fraction": 0.1, "often": 1}, "reselect.often: unknown key"),
    ],
)
def test_a_wrong_plan_is_refused_by_its_field(plan, named):
    with pytest.raises(smt_dist.SMTError, match=named):
        SMTConfig.from_json(json.dumps({"reselect": plan}))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"save_only_model": "true"}, "--save_only_model"),
        ({"save_strategy": "best", "eval_strategy": "steps", "metric_for_best_model": "loss"}, "--save_strategy best"),
        (
            {"load_best_model_at_end": "true", "eval_strategy": "no", "save_strategy": "no", "save_total_limit": 1},
            "--save_total_limit 1",
        ),
    ],
    ids=str,
)
def test_flags_that_take_checkpoints_away_are_refused(train, folder, tmp_path, flags, named):
    """Found before the first step, not at the first exchange."""
    from programs import write_config

    config = write_config(tmp_path, reselect={"every": 2, "fraction": 0.5})
    assert named in train(smt_config=config, eval_file=folder / "train.json", **flags).error


def test_a_grid_of_reselect_blocks_is_the_models():
    """Guards the block size of the tests above."""
    assert BlockGrid(64, 64, *BLOCK).shape == (4, 8)
