"""Every file of a checkpoint or an adapter, with bytes flipped, cut, moved and added: a result or one line.

Each mutation is tried twice: under its old manifest, where nothing but a refusal is right, and under one that fits it,
as somebody who means harm would make it. Memory is capped: a count that is believed before it is checked fails.
"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from architectures import make_model
from damage import mutations, outcome, reseal
from programs import write_json
from safetensors.torch import save_file
from tiers import slow
from torch.optim.lr_scheduler import LambdaLR

import smt_dist
from smt_dist import BlockSelection
from smt_dist.checkpoint.atomic import MANIFEST_FILE
from smt_dist.checkpoint.merge_files import merge_adapter_files
from smt_dist.checkpoint.rotation import verify_checkpoint
from smt_dist.checkpoint.training_state import (
    GLOBAL_BATCH,
    load_random_state,
    load_schedule,
    load_states,
    random_state,
    restore_schedule,
    save_moments,
    save_random_states,
    save_schedule,
)
from smt_dist.engines.base import Moments

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SELECTION = BlockSelection(block_size=(8, 8), blocks={Q: [(0, 1), (3, 0)], V: [(1, 2)]})
SHAPES = {Q: (16, 8), V: (8, 8)}


def schedule_of(groups: int = 1) -> LambdaLR:
    options = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
    return LambdaLR(torch.optim.SGD(options, lr=0.1), lambda step: 1 / (1 + step))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """All files of a checkpoint, small."""
    folder = tmp_path_factory.mktemp("fuzz") / "checkpoint-2"
    model = make_model("llama")
    smt_dist.apply_selection(model, SELECTION)
    smt_dist.save_adapter(model, folder)
    moments = {name: {"exp_avg": torch.ones(shape)} for name, shape in SHAPES.items()}
    save_moments(folder, SHAPES, Moments(["exp_avg"], {"step": 2.0}, iter(moments.items())))
    save_schedule(folder, schedule_of().state_dict(), 8, [1.0])
    save_random_states(folder, [random_state()])
    state = {"global_step": 2, "max_steps": 4, "num_train_epochs": 1, "train_batch_size": 2, "log_history": [{"a": 1}]}
    write_json(folder / "trainer_state.json", state)
    return reseal(folder)


def read_all(folder: Path) -> None:
    """What resuming reads, with what loading puts into a model and a schedule."""
    verify_checkpoint(folder)
    adapter = smt_dist.read_adapter(folder)
    states, _ = load_states(folder, adapter.deltas)
    assert all(tensor.shape == s.delta.shape for s in states for tensor in s.moments.values())
    schedule = load_schedule(folder, [1.0])
    schedule.pop(GLOBAL_BATCH, None)
    restore_schedule(schedule_of(), schedule, folder)
    load_random_state(folder, 0)
    smt_dist.load_adapter(make_model("llama"), folder)


CHECKPOINT_FILES = (
    *("smt_config.json", "smt_selection.json", "smt_blocks.safetensors", "smt_optimizer.safetensors"),
    *("smt_schedule.json", "rng_state_0.json", "trainer_state.json", MANIFEST_FILE),
)


@pytest.mark.parametrize("count", [10, pytest.param(30, marks=slow)])
@pytest.mark.parametrize("name", CHECKPOINT_FILES)
def test_mutated_checkpoint_is_refused_or_read(checkpoint, tmp_path, name, count):
    """A parser that believes what it reads is a hang, a crash, or somebody else's program on the cluster."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    original = (folder / name).read_bytes()
    counts: Counter[str] = Counter()
    for changed in mutations(original, count, seed=CHECKPOINT_FILES.index(name)):
        (folder / name).write_bytes(changed)
        refusal = outcome(lambda: verify_checkpoint(folder))
        if name != MANIFEST_FILE:
            assert (refusal is None) == (changed == original), "the manifest has to see every change"
            reseal(folder)
        counts["refused" if outcome(lambda: read_all(folder)) else "read"] += 1
        if name != MANIFEST_FILE:
            (folder / MANIFEST_FILE).write_bytes((checkpoint / MANIFEST_FILE).read_bytes())
    assert counts["refused"] > 15
    (folder / name).write_bytes(original)
    assert outcome(lambda: read_all(folder)) is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("smt_selection.json", '{"block_size": [8, 8], "blocks": {"m": [' + "[0, 0, 0]," * 10**5 + "[0, 0]]}}"),
        ("smt_selection.json", '{"block_size": [8, 8], "blocks": ' + "[" + "0," * 10**5 + "0]}"),
        ("smt_config.json", '{"groups": [' + '{"name": "a"},' * 10**5 + '{"name": "b"}]}'),
        ("smt_config.json", "{" + ",".join(f'"{i}": 0' for i in range(10**4)) + "}"),
        ("trainer_state.json", '{"log_history": [' + "0," * 10**5 + "0]}"),
    ],
    ids=["wrong blocks", "no mapping", "equal names", "unknown keys", "wrong logs"],
)
def test_a_million_mistakes_are_one_line(checkpoint, tmp_path, name, content):
    """A list of all complaints, or a search of each name among all, takes the machine down."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    (folder / name).write_text(content)
    assert name in outcome(lambda: read_all(reseal(folder)))


def test_file_that_is_too_large_or_never_ends_is_refused_unread(checkpoint, tmp_path):
    """Its size is asked first; a pipe or a device has none."""
    folder = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, folder)
    with open(folder / MANIFEST_FILE, "wb") as file:
        file.truncate(10**10)  # no room taken
    assert "too many" in outcome(lambda: read_all(folder))
    (folder / MANIFEST_FILE).unlink()
    (folder / MANIFEST_FILE).symlink_to("/dev/zero")
    assert "not a regular file" in outcome(lambda: read_all(folder))


def test_random_state_beyond_the_generator_is_refused(tmp_path):
    """numpy takes any position and reads memory there."""
    state = random_state()
    state["numpy"][2] = 10**5
    save_random_states(tmp_path, [state])
    assert "another size" in outcome(lambda: load_random_state(tmp_path, 0))


# -- names -------------------------------------------------------------------------------------------------------

HOSTILE_NAMES = ("../x", "/etc/passwd", "__class__", "", "model", "model.norm", "model.embed_tokens", "lm_head.weight",
                 "model.layers", "a\x1b[2J", "\ud800", "x" * 10**5, f"{Q}.base")  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=lambda name: ascii(name)[:20])
def test_adapter_names_linear_modules_of_the_model_only(tmp_path, name):
    """In training, merging and on the terminal: names are looked up among targets, and never made a path."""
    model = make_model("llama")
    model.save_pretrained(tmp_path / "base")
    smt_dist.apply_selection(model, BlockSelection(block_size=(8, 8), blocks={Q: [(0, 0)]}))
    folder = tmp_path / "adapter"
    smt_dist.save_adapter(model, folder)
    selection = BlockSelection(block_size=(8, 8), blocks={name: [(0, 0)]})
    (folder / "smt_selection.json").write_text(selection.to_json())
    if name != "\ud800":  # no safetensors file can hold it
        save_file({name: torch.zeros(8, 8)}, folder / "smt_blocks.safetensors")
    reseal(folder)
    assert outcome(lambda: smt_dist.load_adapter(make_model("llama"), folder))
    assert outcome(lambda: merge_adapter_files(tmp_path / "base", folder, tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
