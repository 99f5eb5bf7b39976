"""Measured memory: all of it is counted, every byte has a category, and a report says what was measured."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch
from memory_grid import Deviation, deviations, make_grid, summarize
from programs import write_json

from smt_dist.memory.plan.categories import CATEGORIES, Memory
from smt_dist.memory.plan.request import ENGINES, METHODS
from smt_dist.memory.record import plots
from smt_dist.memory.record.allocations import Allocation, CpuAllocations, CudaStatistics, forget_resident_peak
from smt_dist.memory.record.real_tracker import Mark, Place, RealTracker
from smt_dist.memory.record.recording import Recording
from smt_dist.memory.record.report import BARS, JSON_FILE, PAGE, fullest, render_page
from smt_dist.memory.record.timeline import timeline_of_allocations
from smt_dist.memory.record.window import Window

MIB = 2**20
MS = 1_000_000  # nanoseconds


# -- one recording ---------------------------------------------------------------------------------------------------


def test_what_the_allocator_gave_out_gets_the_category_of_the_tensor_in_it():
    """A failure means that bytes are counted twice, or not at all, or as something else."""
    held = [("base_weights", Place(0, 100, 1000), 5 * MS)]  # taken back at 5 ms, unseen by the profiler
    made = [("activations", Place(2 * MS + 10, 500, 64), None), ("gradients", Place(4 * MS, 500, 32), 6 * MS)]
    allocations = [
        Allocation(2 * MS, 500, 64),
        Allocation(3 * MS, 900, 200),  # an operator's own, never a tensor
        Allocation(3 * MS + 10, 900, -200),
        Allocation(3 * MS + 20, 500, -64),
        Allocation(4 * MS - 10, 500, 32),  # taken back by another thread
        Allocation(7 * MS, 700, 8),
        Allocation(8 * MS, 12345, -77),  # of before, known to nobody
    ]
    marks = [Mark(1 * MS, "warmup", "a"), Mark(4 * MS - 20, "training", "b")]
    timeline = timeline_of_allocations(allocations, held + made, marks)
    peaks = timeline.peaks()
    assert peaks["warmup"] == ("a", Memory(base_weights=1000, activations=64, temporary=200))
    assert peaks["training"] == ("b", Memory(base_weights=1000, gradients=32))
    assert timeline.levels[-1].sum() == 8
    assert timeline.thinned(3).peaks()["warmup"][1].total == peaks["warmup"][1].total


def record(work, statistics=None):
    """(timeline, window) of ``work``, called with the window."""
    window = Window("cpu", statistics)
    window.open("training", "beginning")
    work(window)
    return window.close()


def test_categories_add_up_to_what_the_profiler_counted():
    """Checked against the profiler's own running total of the same allocations."""
    before = torch.zeros(MIB)
    layer = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.GELU(), torch.nn.Linear(512, 512))
    x = torch.ones(256, 512)

    def step(window):
        window.register([("base_weights", list(layer.parameters()))])
        window.watch_gradients(layer)
        layer(x).square().sum().backward()

    alone = CpuAllocations()
    alone.start()
    layer(x).square().sum().backward()
    level = most = 0
    for allocation in alone.stop():
        level += allocation.bytes
        most = max(most, level)
    layer.zero_grad()
    timeline = record(step)
    _, peak = timeline.peaks()["training"]
    assert peak.total - _at_the_beginning(timeline) == pytest.approx(most, abs=4096)
    assert peak.base_weights == sum(p.nbytes for p in layer.parameters())
    assert timeline.levels[-1][CATEGORIES.index("gradients")] == peak.base_weights
    assert peak.temporary > before.nbytes  # what was there before and nobody named


def _at_the_beginning(timeline):
    """Bytes that were there when the recording began."""
    return int(timeline.levels[timeline.nanoseconds == timeline.marks[0].nanoseconds][-1].sum())


class StandIn:
    """``torch.cuda``'s counters, with what a GPU's allocator would have said."""

    def __init__(self, *peaks):
        self.peaks = list(peaks)
        self.resets = 0

    def max_memory_allocated(self, _device):
        return self.peaks[0]

    def reset_peak_memory_stats(self, _device):
        self.resets += 1
        if self.resets > 1:
            self.peaks.pop(0)

    def memory_stats(self, _device):
        return {"reserved_bytes.all.peak": 11, "inactive_split_bytes.all.current": 5, "num_alloc_retries": 2}


def test_on_a_gpu_the_allocators_counters_say_how_much_there_is():
    """What torch.cuda counts beyond the tensors is temporary, moment by moment; with a stand-in for its counters."""
    huge = 2**45
    cuda = StandIn(huge, huge + 7 * MIB)
    statistics = CudaStatistics(torch.device("cpu"), cuda)

    def work(window):
        kept = torch.ones(MIB)
        window.mark("save", "later")
        window.register([("blocks", kept)])
        work.kept = kept

    peaks = record(work, statistics).peaks()
    assert peaks["training"][1].total == huge
    assert peaks["save"][1].total == huge + 7 * MIB
    assert peaks["save"][1].blocks == 4 * MIB
    assert cuda.resets == 3  # at the start and at both moments' ends
    assert statistics.summary() == {"reserved_peak_bytes": 11, "fragmented_bytes": 5, "retries": 2}
    for name in ("max_memory_allocated", "reset_peak_memory_stats", "memory_stats"):
        assert callable(getattr(torch.cuda, name))


def test_where_the_mark_of_resident_memory_cannot_be_reset_it_is_said():
    def forbidden(_):
        raise PermissionError

    assert forget_resident_peak(forbidden) is False


def test_a_weight_that_is_filled_in_place_is_a_gathered_one():
    """FSDP2's are there from the beginning, empty, when all that is there counts as temporary until it is named."""
    weight = torch.empty(8)
    weight.untyped_storage().resize_(0)
    with RealTracker() as tracker:
        tracker.register([weight], "temporary")
        tracker.moment("forward")
        weight.untyped_storage().resize_(32)
        weight.untyped_storage().resize_(0)
        tracker.moment("end")
        assert tracker.peaks()["forward"].gathered_weights == 32


# -- a run -----------------------------------------------------------------------------------------------------------


def test_a_profiled_run_reports_every_phase_beside_its_plan(train, tmp_path):
    """The whole way: flags, recording, plan, files, table."""
    folder = tmp_path / "memory"
    outcome = train(profile_memory=folder, max_steps=3)
    assert outcome.code == 0, outcome.err
    report = json.loads((folder / JSON_FILE).read_text())
    assert report["no_plan"] is None
    (rank,) = report["ranks"]
    assert set(rank["phases"]) == {"load", "warmup", "selection", "setup", "training", "save"}
    assert set(report["planned"]) == {"load", "warmup", "training"}
    assert rank["resident_bytes_unrecorded"]["setup"] > 0
    for timeline in rank["timelines"]:
        assert len(timeline["seconds"]) <= 1000
        assert set(timeline["bytes"]) == set(CATEGORIES)
    for value in rank["phases"].values():
        assert value["peak"]["total"] == sum(value["peak"][name] for name in CATEGORIES)
    peak = rank["phases"]["training"]["peak"]
    for name in ("base_weights", "blocks", "gradients", "optimizer_state", "activations"):
        assert peak[name] > 0, name
    assert {path.name for path in folder.iterdir()} == {JSON_FILE, PAGE, BARS, "timeline_rank_0.png"}
    assert re.search(r"training +\d.*MiB +\d.*MiB +[+-]", outcome.out)
    assert (folder / PAGE).read_text().count("data:image/png;base64,") == 2


def test_without_matplotlib_the_run_ends_before_it_begins(train, tmp_path, monkeypatch):
    """Else the work would be lost to an import error at its end."""
    monkeypatch.setattr(plots, "find_spec", lambda _: None)
    outcome = train(profile_memory=tmp_path / "memory")
    assert "--profile_memory: matplotlib is not installed; pip install" in outcome.error
    assert not (tmp_path / "memory").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"profile_memory": "{file}"}, "--profile_memory: "),
        ({"profile_memory_steps": 0}, "--profile_memory_steps: must be at least 1, not 0"),
    ],
)
def test_bad_flags_of_a_profiled_run_get_one_line(train, tmp_path, flags, message):
    (tmp_path / "file").write_text("")
    given = {name: str(value).format(file=tmp_path / "file") for name, value in flags.items()}
    assert message in train(**given).error


def test_the_page_needs_nothing_else_and_escapes_what_it_is_given():
    """A failure means that a page sent to someone else is empty, or that a model's name runs as a script."""
    recording = Recording(0, "cpu", peaks={"training": ("<b>step</b>", Memory(blocks=MIB))}, resident={"training": 3})
    report = {
        "run": {"model": "<script>alert(1)</script>"},
        "planned": {},
        "no_plan": "a & b",
        "ranks": [recording.to_json()],
    }
    page = render_page(report, {"a.png": b"png"})
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "a &amp; b" in page
    assert set(re.findall(r'(?:src|href)="([^"]{0,10})', page)) == {"data:image"}
    assert "http" not in page


def test_the_fullest_rank_of_each_phase_is_reported():
    """The emptiest would promise too much."""
    ranks = [Recording(rank, "cpu", {"load": ("m", Memory(blocks=size))}).to_json() for rank, size in ((0, 5), (1, 9))]
    assert fullest(ranks)["load"]["rank"] == 1


# -- the validation --------------------------------------------------------------------------------------------------


def test_the_grid_has_every_engine_and_method_in_both_dtypes_on_two_ranks():
    cells = make_grid()
    assert len({cell.name for cell in cells}) == len(cells)
    two = {(cell.engine, cell.method, cell.dtype) for cell in cells if cell.ranks == 2}
    assert two == {(e, m, d) for e in ENGINES for m in METHODS for d in ("float32", "bfloat16")}
    assert {cell.checkpointing for cell in cells if cell.engine == "zero2"} == {False, True}


def test_a_plan_holds_within_five_percent_or_16_mib_of_the_fullest_rank():
    rows = [(95, 100, True), (85, 100, True), (900, 1000, False), (951, 1000, True)]
    assert [Deviation("c", "training", a * MIB, b * MIB).holds for a, b, _ in rows] == [holds for *_, holds in rows]
    cells = {"c": {"planned": {"training": {"total": 90}}, "measured": {"training": [{"total": 50}, {"total": 100}]}}}
    (found,) = deviations(cells)
    assert found.relative == pytest.approx(-0.1)
    assert summarize([found])["median"] == pytest.approx(0.1)


def test_validation_runs_its_cells_and_goes_on_where_it_stopped(run, tmp_path, monkeypatch):
    """A failure means that plans are no longer compared with anything, or that an hour's work is done again."""
    output = tmp_path / "validation.json"
    flags = ("--small", "--engines", "ddp", "--methods", "smt", "--dtypes", "float32", "--ranks", "1")
    command = ("profile_memory.py", "validate", *flags, "--output", str(output))
    first = run(*command)
    assert first.code == 0, first.err
    report = json.loads(output.read_text())
    assert set(report["cells"]) == {"ddp smt float32 1", "ddp smt float32 checkpointing 1"}
    assert report["summary"]["phases"] == report["summary"]["within_relative"] == 4
    assert "4 peaks: 4 within 5 % or 16 MiB" in first.out

    lost = report["cells"].pop("ddp smt float32 1")
    write_json(output, report)
    asked = []

    def measure(cells):
        for cell in cells:
            asked.append(cell.name)
            yield cell, {"measured": lost["measured"]}

    monkeypatch.setattr("validate_memory._measure", measure)
    assert run(*command).code == 0
    assert asked == ["ddp smt float32 1"]
    assert json.loads(output.read_text())["cells"] == report["cells"] | {"ddp smt float32 1": lost}


def test_a_cell_that_fails_is_named_and_the_program_ends_with_an_error(run, monkeypatch, tmp_path):
    """Else a grid of which half failed would look right."""
    import validate_memory

    monkeypatch.setattr(validate_memory, "_measure", lambda cells: ((cell, {"error": "Boom"}) for cell in cells))
    flags = ("--small", "--engines", "ddp", "--methods", "lora", "--dtypes", "float32", "--ranks", "1")
    outcome = run("profile_memory.py", "validate", *flags, "--output", str(tmp_path / "v.json"))
    assert "a cell failed" in outcome.error
    assert "failed: Boom" in outcome.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--engines", "zero9"), "--engines: zero9 is not one of ddp, fsdp2, zero1, zero2, zero3"),
        (("--ranks", "7"), "--ranks: 7 is not one of 1, 2"),
        (("--engines", "fsdp2", "--ranks", "1"), "no cell of the grid has all of these"),
        (("--output", "{other}"), "was made with other settings"),
        (("--output", "{wrong}"), "is no validation's"),
    ],
)
def test_bad_input_of_the_validation_gets_one_line(run, tmp_path, flags, message):
    write_json(tmp_path / "other.json", {"cells": {"ddp smt float32 1": {"cell": {}}}})
    write_json(tmp_path / "wrong.json", {"rows": []})
    names = SimpleNamespace(other=tmp_path / "other.json", wrong=tmp_path / "wrong.json")
    given = [flag.format(**vars(names)) for flag in flags]
    assert message in run("profile_memory.py", "validate", *given).error
