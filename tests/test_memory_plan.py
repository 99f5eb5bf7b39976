"""The planner's promises: what it says before a launch is what the launch then takes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from harness import launch
from memory_grid import GATHERED
from tiers import slow, slow_rows_unless
from transformers import BertConfig, LlamaConfig, T5Config
from workers.memory import SHAPE, small_request

from smt_dist import SMTConfig, SMTError
from smt_dist.memory.plan.categories import CATEGORIES, GIB, Memory, parse_size
from smt_dist.memory.plan.plan import make_plan
from smt_dist.memory.plan.request import Request
from smt_dist.memory.plan.search import _changed, _largest, search
from smt_dist.memory.plan.spread import even_counts, measure_shape, selection_of, worst_counts
from smt_dist.memory.plan.trace import trace_training
from smt_dist.memory.plan.zero import ZeroModel, ZeroSettings

MIB = 2**20
# The cells that are run for real. Targets: 5 % or 16 MiB; these models are small, so the percentage is what counts.
# CPUs without bf16 instructions are many times slower in it, so it gets few tokens.
SHORT = {"batch": 1, "sequence": 24}
BUCKETS = {"reduce_bucket_size": 300_000}  # several, as in large models with DeepSpeed's defaults
ONE_RANK = [
    {"method": "smt", "smt": {"selection": {"score": "abs_mean"}}, **SHORT},
    {"method": "smt", "checkpointing": True, "dtype": "float32", "smt": {"selection": {"score": "mean_abs"}}},
    {"method": "full", "dtype": "float32"},
    {"method": "full", "dtype": "float32", "checkpointing": True},
    {"method": "lora", **SHORT},
    # The last: DeepSpeed keeps a ZeRO-3 model alive. One rank has nothing to gather but the chunked loss's head.
    {"method": "smt", "engine": "zero3", "dtype": "float32", "zero": GATHERED},
]
# In fp32: without bf16 instructions a product of bf16 matrices copies one of them inside the operator; here the head's
# copy would be the peak.
TWO_RANKS = [
    {"method": "smt", "engine": "fsdp2", "world_size": 2, "smt": {"selection": {"score": score}}, **options}
    for score, options in (
        ("abs_mean", {"dtype": "float32"}),
        ("mean_abs", {"dtype": "float32", "checkpointing": True}),
    )
]
TWO_RANKS += [
    {"method": "full", "engine": "fsdp2", "world_size": 2, "dtype": "float32"},
    {"method": "smt", "engine": "ddp", "world_size": 2, "smt": {"selection": {"score": "abs_mean"}}, **SHORT},
]
TWO_RANKS += [
    {"method": "full", "engine": "zero1", "world_size": 2, "dtype": "float32", "zero": BUCKETS},
    {"method": "lora", "engine": "zero2", "world_size": 2, "dtype": "float32", "zero": BUCKETS},
    # The last: DeepSpeed keeps a ZeRO-3 model alive.
    {"method": "smt", "engine": "zero3", "world_size": 2, "dtype": "float32", "zero": GATHERED},
]

# Enough for all layers, and quick.
FEW = {"groups": [{"blocks": 66}]}


def assert_near(planned: int, measured: int, label: str) -> None:
    assert abs(planned - measured) <= 0.05 * measured, f"{label}: planned {planned:,}, measured {measured:,}"


QUICK = TWO_RANKS[:1]
REST = [cell for cell in TWO_RANKS if cell not in QUICK]


@pytest.mark.parametrize(
    ("ranks", "cells"),
    [(2, QUICK), pytest.param(1, ONE_RANK, marks=slow), pytest.param(2, REST, marks=slow)],
    ids=["smt under fsdp2", "1 rank", "2 ranks"],
)
def test_planned_peaks_are_the_profilers(tmp_path, ranks, cells):
    """A failure means people are told that a run fits which doesn't, or that they need more devices than they do."""
    measured = launch("workers.memory:measure", ranks, tmp_path, timeout=400, cells=cells)[0]
    for cell, found in zip(cells, measured, strict=True):
        plan = make_plan(small_request(backend="gloo", **json.loads(json.dumps(cell))))
        for phase in ("training", "warmup"):
            if phase in found:
                assert_near(plan.phases[phase].peak.total, found[phase]["total"], f"{cell} {phase}")


@pytest.mark.parametrize(
    ("engine", "method", "checkpointing"),
    slow_rows_unless(
        [
            *(("ddp", method, False) for method in ("smt", "full", "lora")),
            *(("fsdp2", method, True) for method in ("smt", "full", "lora")),
            ("fsdp2", "smt", False),
            ("zero3", "smt", True),
        ],
        lambda *case: case in [("ddp", "smt", False), ("fsdp2", "lora", True)],
    ),
)
def test_two_small_depths_tell_the_whole_depth(engine, method, checkpointing):
    """A failure means another moment leads at the full depth than was reckoned, or peaks don't grow evenly."""
    request = small_request(
        engine=engine,
        world_size=4,
        method=method,
        checkpointing=checkpointing,
        shape={"num_hidden_layers": 11},
        smt=FEW,
    )
    near, whole = make_plan(request), make_plan(request, exact=True)
    for name, phase in whole.phases.items():
        assert near.phases[name].peak.total == pytest.approx(phase.peak.total, rel=0.02), name
    if whole.worst:
        assert near.worst.peak.total == pytest.approx(whole.worst.peak.total, rel=0.02)


@pytest.mark.parametrize(
    ("engine", "replicas", "shards"),
    [("ddp", 1, 1), pytest.param("fsdp2", 1, 8, marks=slow), ("fsdp2", 2, 4)],
)
def test_a_rank_holds_its_share_of_the_base_and_of_the_state(engine, replicas, shards):
    """A failure means that planning charges frozen weights as trained ones, or a replica as a shard."""
    plan = make_plan(small_request(engine=engine, world_size=8, replicas=replicas, checkpointing=True))
    peak = plan.phases["training"].peak
    assert peak.base_weights == pytest.approx(2 * plan.parameters / shards, rel=0.01)
    assert peak.optimizer_state == pytest.approx(12 * plan.trained / 8, rel=0.01)
    assert peak.blocks == pytest.approx(2 * plan.trained * (1 + 1 / 8), rel=0.01)  # values, and a share of W0
    assert (peak.gathered_weights > 0) == (engine == "fsdp2")


@pytest.mark.parametrize("method", ["smt", pytest.param("full", marks=slow)])
@pytest.mark.parametrize("engine", [pytest.param("fsdp2", marks=slow), "zero3"])
def test_what_gloo_copies_is_planned_for_gloo_alone(engine, method):
    """On GPUs, memory that is never used; on CPU, a whole embedding too little."""
    large = {"engine": engine, "method": method, "world_size": 2, "shape": {"vocab_size": 40000}, "smt": FEW, **SHORT}
    nccl, gloo = (
        make_plan(small_request(**large, zero=BUCKETS | GATHERED if engine == "zero3" else {}, backend=backend))
        for backend in ("nccl", "gloo")
    )
    embedding = nccl.request.base_dtype.itemsize * 40000 * SHAPE["hidden_size"]
    assert 0 < gloo.phases["training"].peak.total - nccl.phases["training"].peak.total <= embedding


@pytest.mark.parametrize(
    ("stage", "base", "gradients", "blocks", "bucket"), [(1, 2, 6, 2, 0), (2, 2, 1, 2, 2), (3, 0.5, 1, 0.5, 4)]
)
def test_zero_partitions_what_its_stage_says(stage, base, gradients, blocks, bucket):
    """Bytes an element on 4 ranks in bf16 at the end of a backward, from DeepSpeed's description of each stage."""
    settings = ZeroSettings(stage, reduce_bucket_size=10, param_persistence_threshold=0)
    zero = ZeroModel(settings, 4, 2, frozen=[4000, 8000], trained=[400], base_is_trained=False)
    traced = {"forward head": Memory(), "backward layer 0": Memory(gradients=2 * 400)}
    memory = zero.moments(traced, gradient_width=2)["reduction"]
    assert memory.base_weights == base * 12000
    assert memory.gradients == gradients * 400
    assert memory.blocks == blocks * 400
    assert memory.optimizer_state == 12 * 400 / 4
    assert memory.communication == bucket * 10


@pytest.mark.parametrize("form", ["auto", "additive"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_blocks_and_state_are_what_the_real_optimizer_holds(dtype, form):
    """The same bytes as ``ShardedBlockOptimizer.memory_bytes`` counts on a real model."""
    from memory_cell import load_model

    from smt_dist import apply_selection
    from smt_dist.engines.replicated import ReplicatedBlocks
    from smt_dist.training.trainer import block_parameter_groups

    request = small_request(dtype=dtype, smt={"form": form})
    shape = measure_shape(request)
    selection = selection_of(even_counts(shape)[0], shape.grids, request.layers)
    planned = trace_training(request, request.layers, selection)["step"]
    model = load_model(request)
    apply_selection(model, selection, request.smt, dtype=request.base_dtype, auto_form="in_place")
    groups = block_parameter_groups(model, 1e-4, 0.0)
    optimizer = ReplicatedBlocks().make_optimizer(groups, torch.optim.AdamW, {}, model=model)
    optimizer.step()
    real = optimizer.memory_bytes()
    counters = 64  # the steps that AdamW counts
    assert planned.blocks == real["values"] + real.get("original", 0)
    assert 0 <= planned.optimizer_state - real["masters"] - real["moments"] <= counters
    assert planned.gradients == real["gradients"]


def test_a_given_selection_is_planned_layer_by_layer():
    """All blocks in the top layer: layers below need no backward, so they keep nothing."""
    request = small_request(shape={"num_hidden_layers": 11})
    shape = measure_shape(request)
    top, bottom = ({f"model.layers.{layer}.self_attn.q_proj": 20} for layer in (7, 0))
    peaks = [
        make_plan(small_request(shape={"num_hidden_layers": 11}, selection=selection_of(counts, shape.grids, 8)))
        for counts in (top, bottom)
    ]
    above, below = (plan.phases["training"].peak for plan in peaks)
    assert above.activations < 0.6 * below.activations
    assert above.optimizer_state == below.optimizer_state
    assert "warmup" not in peaks[0].phases
    assert peaks[0].worst is None


def test_the_worst_case_holds_every_block_from_the_bottom():
    """Else the worst case would be smaller than what a warm-up may choose."""
    shape = measure_shape(small_request(smt={"groups": [{"blocks": 150}]}))
    counts = worst_counts(shape)
    assert sum(counts.values()) == 150
    assert list(counts) == list(shape.grids)[: len(counts)]
    even, left = even_counts(shape)
    assert sum(even.values()) + left == 150


@pytest.mark.parametrize("what", [pytest.param("batch", marks=slow), "sequence"])
def test_more_tokens_never_take_less(what):
    """A failure would make a search stop at the wrong value."""
    values = {"batch": (1, 2, 4), "sequence": (32, 64, 128)}[what]
    totals = [make_plan(small_request(**{what: value}, smt=FEW)).peak_bytes for value in values]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


@pytest.mark.parametrize(("what", "values"), [("batch", (2, 5)), pytest.param("world_size", (8, 1), marks=slow)])
def test_what_a_search_finds_fits_and_the_next_does_not(what, values):
    """A failure means devices stand half empty, or the run fails on the largest batch that was promised."""
    engine = "fsdp2" if what == "world_size" else "ddp"
    request = small_request(engine=engine, batch=1, sequence=32, smt=FEW)
    fitting, too_much = (make_plan(_changed(request, what, value)).peak_bytes for value in values)
    found = search(replace(request, device_memory=(fitting + too_much) // 2), what)
    assert found.value is not None
    assert found.plans[found.value].fits
    next_value = found.value // 2 if what == "world_size" else found.value + 1
    assert not found.plans[next_value].fits


@pytest.mark.parametrize("memory", [999, 1100, 2500, 9000, 10**6])
@pytest.mark.parametrize(
    "peak", [lambda v: 1000 + 17 * v, lambda v: 1000 + 17 * v + v * v // 7, lambda v: 1000 + max(100, 3 * v)]
)
def test_the_search_looks_at_few_values_and_proves_its_end(peak, memory):
    """Each look is a plan of seconds; and the value after the found one must have been seen not to fit."""
    seen = set()

    def look(value):
        seen.add(value)
        return peak(value)

    found = _largest(4096, look, memory)
    assert found == max((value for value in range(1, 4097) if peak(value) <= memory), default=None)
    assert found in (None, 4096) or found + 1 in seen
    assert len(seen) <= 30


def test_a_search_that_finds_nothing_says_so():
    """One row that doesn't fit must not come back as a batch of one."""
    assert search(small_request(device_memory=MIB, smt=FEW), "batch").value is None


def test_passes_of_the_warm_up_shrink_its_accumulator():
    """``warmup.passes`` is there for memory alone."""
    peaks = [
        make_plan(small_request(smt=FEW | {"warmup": {"passes": passes}})).phases["warmup"].peak.statistics
        for passes in (1, 3)
    ]
    assert peaks[1] == pytest.approx(peaks[0] / 3, rel=0.05)


@pytest.mark.parametrize(
    ("text", "size"), [("80GiB", 80 * GIB), ("40GB", 40 * 10**9), ("512 mib", 512 * MIB), ("1000", 1000)]
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "80 XB", "-1GiB", "0"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(SMTError, match="is no size"):
        parse_size(text)


@pytest.fixture
def model_config(tmp_path):
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "model")
    (tmp_path / "smt.json").write_text(SMTConfig.model_validate({"block_size": 32}).to_json())
    return tmp_path / "model" / "config.json"


def test_the_program_prints_a_table_and_writes_whole_bytes(run, model_config, tmp_path):
    """Other programs read the file: categories must add up to the total."""
    output = tmp_path / "plan.json"
    outcome = run(
        "profile_memory.py", "plan", "--model_config", str(model_config), "--smt_config", str(tmp_path / "smt.json"),
        "--engine", "zero2", "--world_size", "2", "--device_memory", "80GiB", "--output", str(output),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "fits into 80.00 GiB" in outcome.out
    plan = json.loads(output.read_text())
    assert plan["fits"] is True
    for name in ("load", "warmup", "training"):
        peak = plan["phases"][name]["peak"]
        assert all(isinstance(size, int) for size in peak.values())
        assert peak["total"] == sum(peak[category] for category in CATEGORIES)


WRONG = [
    ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size: must be at least 1, not 0"),
    ({"engine": "zero4"}, "--engine: 'zero4' is not one of ddp, zero1"),
    ({"engine": "fsdp2", "world_size": 6, "dp_replicate_size": 4}, "6 ranks can't be cut into 4 equal replicas"),
    ({"dp_replicate_size": 2, "world_size": 2}, "--dp_replicate_size belongs to --engine fsdp2"),
    ({"device_memory": "much"}, "'much' is no size"),
    ({"search": "batch"}, "--search needs --device_memory"),
    ({"backend": "mpi"}, "--backend: 'mpi' is not one of nccl, gloo"),
    ({"search": "luck", "device_memory": "1GiB"}, "--search: 'luck' is not one of"),
    ({"world_size": "many"}, "--world_size: invalid int value"),
    ({"model_name_or_path": "x"}, "give --model_config or --model_name_or_path, one of them"),
    ({"model_config": "missing.json"}, "--model_config: missing.json: no such file"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG)
def test_bad_input_is_refused_in_one_line(run, model_config, flags, message):
    """A failure means a traceback, or a plan of something else than was asked for."""
    given = {"model_config": model_config, **flags}
    options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert message in run("profile_memory.py", "plan", *options).error


@pytest.mark.parametrize("config", [T5Config(), BertConfig(architectures=["BertForMaskedLM"])])
def test_a_model_that_is_no_causal_one_is_refused(run, tmp_path, config):
    config.save_pretrained(tmp_path)
    outcome = run("profile_memory.py", "plan", "--model_config", str(tmp_path / "config.json"))
    assert "is not a causal language model" in outcome.error


def test_engines_are_the_planners():
    """``--help`` lists them without importing torch, so the list stands twice."""
    from smt_dist.cli.plan import ENGINES as LISTED
    from smt_dist.memory.plan.request import ENGINES

    assert LISTED == ENGINES
    with pytest.raises(SMTError, match="--method"):
        Request(model=LlamaConfig(), method="dora")
    assert Memory(base_weights=1, temporary=2).total == 3
