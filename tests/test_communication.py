"""A step moves the blocks once each way, and the base no more often than without blocks: all collectives counted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from harness import launch
from programs import LAUNCH
from test_training_parity import ENGINE_TYPES
from tiers import all_differences, asks_for, chosen, slow, slow_unless
from workers.communication import STEPS
from workers.training import BLOCK, BLOCKS

from smt_dist.memory.plan.collectives import NAMESPACES, OPERATORS, SILENT, Collective, totals
from smt_dist.models.chunked_loss import CHUNK

ELEMENTS = sum(map(len, BLOCKS.values())) * BLOCK[0] * BLOCK[1]
GRADIENTS = ELEMENTS * 4  # bytes, reduced in fp32
VALUES = ELEMENTS * 2  # bytes, gathered in the base's bf16
ONE_MODULE = {len(blocks) * BLOCK[0] * BLOCK[1] * 2 for blocks in BLOCKS.values()}  # bytes of its values
# (ranks, engine, accumulation, a second all-reduce added on purpose)
RUNS = [
    *[(2, engine, 1, False) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")],
    *[(2, engine, 2, False) for engine in ("ddp", "fsdp2")],
    (2, "ddp", 1, True),
    *[(4, engine, 2, False) for engine in ("ddp", "hsdp")],
]
HONEST = [run for run in RUNS if not run[3]]
QUICK = [(2, "ddp", 2, False), (2, "fsdp2", 2, False), (2, "zero2", 1, False), (2, "zero3", 1, False)]


def each_run(*engines: str):
    runs = slow_unless([run for run in HONEST if run[1] in engines], lambda run: run in QUICK)
    return pytest.mark.parametrize("run", runs, ids=lambda run: f"{run[1]}-{run[0]}ranks-acc{run[2]}")


@pytest.fixture(scope="module")
def found(request, tmp_path_factory, model_folder):
    """Run, or "operators" -> each rank's findings."""
    results, asked = {}, chosen(request, "run")
    if asks_for(request, "test_a_second_all_reduce_would_be_seen"):
        asked += [(2, "ddp", 1, False), (2, "ddp", 1, True)]
    for world_size in sorted({2, *(run[0] for run in asked)}):
        runs = [run for run in RUNS if run in asked and run[0] == world_size]
        ranks = launch(
            "workers.communication:count_steps",
            world_size,
            tmp_path_factory.mktemp(f"ranks{world_size}"),
            model=str(model_folder),
            runs=[{"engine": e, "accumulation": a, "leak": leak} for _, e, a, leak in runs],
        )
        results |= {run: [rank["runs"][index] for rank in ranks] for index, run in enumerate(runs)}
        if world_size == 2:
            results["operators"] = [rank["operators"] for rank in ranks]
    return results


def without_bookkeeping(step, world_size):
    """Trainer gathers a token count a step and two scalars a log, of at most 8 bytes a rank; the guards, 4 integers."""
    small = [call for call in step if call[0] == "all_gather" and call[1] <= 8 * world_size]
    guards = [call for call in step if call == ("all_gather", 4 * 8 * world_size, "torch.int64")]
    assert len(small) == 3, small
    assert len(guards) == 1, guards
    return [call for call in step if call not in [*small, *guards]]


def of_base(calls):
    """The base's all-gathers, by bytes; those of the blocks have other sizes."""
    return Counter(size for kind, size, _ in calls if kind == "all_gather" and size not in {VALUES, *ONE_MODULE})


@each_run("ddp", "fsdp2", "hsdp")
def test_a_step_moves_the_blocks_once_each_way(found, run):
    """A hidden second all-reduce (Trainer's, accelerate's, DDP's) doubles the traffic and gives the same losses."""
    # Under fsdp2 in slices, one for each rank, which are as much together.
    ways = {"ddp": [("reduce_scatter", GRADIENTS, "torch.float32")]}
    sliced = [("reduce", GRADIENTS // run[0], "torch.float32")] * run[0]
    for rank in found[run]:
        for step in rank["steps"]:
            calls = without_bookkeeping(step, run[0])
            others = [call for call in calls if call[0] != "all_gather" or call[1] == VALUES]
            assert others == [
                *ways.get(run[1], sliced),
                ("all_reduce", 8, "torch.float64"),  # the squared norm, for clipping
                ("all_gather", VALUES, "torch.bfloat16"),
            ]


@each_run("ddp", "fsdp2", "hsdp")
def test_the_base_is_gathered_as_often_as_without_blocks(found, run):
    """More gathers mean that the blocks disturb FSDP2's order, fewer that the comparison compares something else."""
    for rank in found[run]:
        for step in rank["steps"]:
            once = of_base(rank["base"])
            expected = Counter({size: count * run[2] for size, count in once.items()})
            assert of_base(without_bookkeeping(step, run[0])) == expected
            assert (not expected) == (run[1] == "ddp"), "a sharded base has to be gathered"


@each_run("zero3")
def test_zero3_gathers_nothing_that_the_frozen_base_does_not(found, run):
    """DeepSpeed moves the blocks itself; what is asserted is that they cost no gather of the base beside them."""
    for rank in found[run]:
        for step in rank["steps"]:
            ours = of_base(without_bookkeeping(step, run[0]))
            once = of_base(rank["base"])
            assert sum(once.values()) > 20, "every weight has to be gathered for forward and backward"
            # The base's first layer may stay away: its blocks' inputs need no gradient.
            assert all(count <= run[2] * once[size] for size, count in ours.items()), (ours, once)


@each_run("zero3")
def test_zero3_moves_the_blocks_as_any_trained_weight(found, run):
    """At most: values gathered for each forward and backward, gradients reduced once a micro-batch, two scalars."""
    for rank in found[run]:
        for step in rank["steps"]:
            calls = without_bookkeeping(step, run[0])
            values = sum(size for kind, size, _ in calls if kind == "all_gather" and size in ONE_MODULE)
            gradients = sum(size for kind, size, _ in calls if kind == "reduce_scatter")
            rest = [call for call in calls if call[0] not in ("all_gather", "reduce_scatter")]
            assert VALUES < values <= 2 * run[2] * VALUES
            assert GRADIENTS <= gradients <= run[2] * GRADIENTS
            assert len(rest) <= 2, rest
            assert all(size <= 8 for _, size, _ in rest), rest


@each_run("zero1", "zero2")
def test_zero12_move_the_blocks_only(found, run):
    """DeepSpeed all-reduces where we reduce-scatter; the frozen base must not come along."""
    for rank in found[run]:
        for step in rank["steps"]:
            calls = without_bookkeeping(step, run[0])
            # One gather for each learning rate.
            assert sum(size for kind, size, _ in calls if kind == "all_gather") == VALUES
            reduced = [(kind, size) for kind, size, _ in calls if kind != "all_gather" and size > 8]
            assert reduced == [("all_reduce", GRADIENTS)]


@slow
def test_a_second_all_reduce_would_be_seen(found):
    """Guards the tests above: they can fail."""
    for honest, leaking in zip(found[2, "ddp", 1, False], found[2, "ddp", 1, True], strict=True):
        for clean, step in zip(honest["steps"], leaking["steps"], strict=True):
            assert Counter(step) - Counter(clean) == Counter([("all_reduce", GRADIENTS, "torch.float32")])


@each_run("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
def test_run_was_what_it_claims_to_be_and_gloo_recorded_as_much(found, run):
    """Guards the tests above: a collective that goes past the counter makes every promise worthless."""
    world_size, engine, _, _ = run
    expected = "DeepSpeedEngine, BF16_Optimizer" if engine == "zero1" else ENGINE_TYPES[engine]
    with all_differences() as check:
        for index, rank in enumerate(found[run]):
            with check(f"rank {index}: world size and engine"):
                assert (rank["world_size"], rank["engine"]) == (world_size, expected)
            with check(f"rank {index}: steps"):
                assert len(rank["steps"]) == STEPS
            with check(f"rank {index}: every block moved"):
                assert rank["moved"] > 0
            with check(f"rank {index}: counted as gloo recorded"):
                assert rank["counted"] == rank["profiled"] > 0


def test_counts_every_way_to_call_a_collective(found):
    """In place, functional, coalesced, of objects, in a backward, by DDP: kinds and bytes, and gloo's own record."""
    fp32, whole = "torch.float32", 2 * 32
    expected = {
        "all_reduce": [("all_reduce", 32, fp32)],
        "all_gather_into_tensor": [("all_gather", whole, fp32)],
        "all_gather": [("all_gather", whole, fp32)],
        "reduce_scatter_tensor": [("reduce_scatter", 32, fp32)],
        "broadcast": [("broadcast", 32, fp32)],
        "reduce": [("reduce", 32, fp32)],
        "gather": [("gather", whole, fp32)],
        "scatter": [("scatter", whole, fp32)],
        "all_to_all_single": [("all_to_all", 32, fp32)],
        "functional all_reduce": [("all_reduce", 32, fp32)],
        "functional gather, and its backward": [("all_gather", whole, fp32), ("reduce_scatter", whole, fp32)],
        "coalesced all_reduce": [("all_reduce", 32 + 64, fp32)],
        "coalesced gather": [("all_gather", 64 + 128, fp32)],
    }
    for index, rank in enumerate(found["operators"]):
        for name, calls in expected.items():
            assert rank[name]["calls"] == calls, name
        assert [call[:2] for call in rank["barrier"]["calls"]] == [("barrier", 0)]
        assert rank["message"]["calls"] == [(("send", "recv")[index], 32, fp32)]
        # A size, then bytes; of DDP, the gradients of 20 parameters are the last.
        assert [call[0] for call in rank["objects"]["calls"]] == ["all_gather", "all_gather"]
        assert rank["DDP"]["calls"][-1] == ("all_reduce", 80, fp32)
        for name, one in rank.items():
            assert len(one["calls"]) == one["profiled"], name


def test_knows_every_operator_of_this_torch():
    """A torch with a new collective must not slip one past the counter: it raises on names that it doesn't know."""
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.split("::")[0] in NAMESPACES}
    assert len(registered) > 30
    assert registered <= set(OPERATORS) | SILENT


def test_what_a_rank_sends_follows_from_the_ring():
    """The means of SMT's and full fine-tuning's rows are compared in these bytes."""
    calls = [Collective(kind, 800, torch.float32, 4) for kind in ("all_gather", "reduce_scatter", "all_reduce")]
    assert [total.sent for total in totals(calls, steps=2).values()] == [300, 300, 600]
    assert Collective("send", 800, torch.float32, 4).sent == 800
    assert Collective("recv", 800, torch.float32, 4).sent == 0


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_large_model_on_the_fake_group_moves_as_a_small_one_on_real_ranks(engine):
    """The benchmark's large rows say something only if they follow the law that real ranks follow."""
    benchmark = importlib.import_module("communication_fake")
    smt, full = (benchmark.count("llama-2-7b", engine, method, layers=2) for method in ("smt", "full"))
    assert smt["ranks"] == 8
    assert smt["trained"] % 8 == 0, "or the blocks are padded"
    blocks = {kind: (total["calls"], total["bytes"]) for kind, total in smt["blocks"].items()}
    kind, calls = ("reduce", smt["ranks"]) if engine == "fsdp2" else ("reduce_scatter", 1)
    assert blocks == {kind: (calls, 4 * smt["trained"]), "all_gather": (1, 2 * smt["trained"])}
    assert smt["kinds"][kind] == smt["blocks"][kind]
    assert smt["kinds"]["all_reduce"]["bytes"] == 8
    gathers = full["kinds"].get("all_gather", {"calls": 0, "bytes": 0})
    assert (gathers["calls"] > 0) == (engine == "fsdp2")
    spared, instead = [], []
    if engine == "fsdp2":
        head, weight = 32000 * 4096, 4096**2
        # Nothing below the lowest blocks learns, so the embedding and its layer's q and k, units of their own, have no
        # backward; FSDP2 fetches v ahead for one that doesn't come. The head comes once, in chunks, not twice.
        spared, instead = [head, weight, weight, head, head], [CHUNK * 4096] * -(-32000 // CHUNK)
    assert smt["kinds"]["all_gather"]["calls"] == gathers["calls"] + 1 - len(spared) + len(instead)
    assert smt["kinds"]["all_gather"]["bytes"] == gathers["bytes"] + 2 * (smt["trained"] - sum(spared) + sum(instead))


def test_the_program_prints_and_writes_every_row(tmp_path):
    """A failure means that `communication.py` is broken."""
    output = tmp_path / "new" / "communication.json"
    flags = [
        "--engines",
        "ddp",
        "--models",
        "--steps",
        "1",
        "--layers",
        "2",
        "--output",
        str(output),
    ]
    command = [sys.executable, str(LAUNCH / "benchmarks" / "communication.py"), *flags, "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert finished.returncode == 0, finished.stderr
    smt, full = json.loads(output.read_text())["real_ranks"]
    assert [smt["method"], full["method"]] == ["smt", "full"]
    assert finished.stdout.count("ddp ") == 2
    assert {kind: total["calls"] for kind, total in smt["blocks"].items()} == {"reduce_scatter": 1, "all_gather": 1}
    assert full["kinds"]["all_reduce"]["bytes"] >= 2 * full["trained"]


def test_the_program_refuses_what_it_cannot_count():
    """A failure means a traceback where one line would do."""
    command = [sys.executable, str(LAUNCH / "benchmarks" / "communication.py"), "--ranks", "1"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 2
    assert finished.stderr.strip().endswith("--ranks 1: one rank sends nothing, and hsdp needs an even number")
