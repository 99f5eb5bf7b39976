"""Save two adapters by turns, be killed at random moments, and read what is left."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import torch
from architectures import make_model

import smt_dist
from smt_dist import BlockSelection

Q = "model.layers.0.self_attn.q_proj"


def make_models() -> dict[str, torch.nn.Module]:
    """Two adapters that differ in every file: values, number of blocks, config."""
    models = {}
    for value, blocks in ((1.0, [(0, 0)]), (2.0, [(0, 0), (1, 1)])):
        model = make_model("llama")
        smt_dist.apply_selection(model, BlockSelection(block_size=(8, 8), blocks={Q: blocks}))
        for layer in smt_dist.sparse_layers(model).values():
            layer.delta.data.fill_(value)
        models[f"{len(blocks)} of {value}"] = model
    return models


def what_is_there(folder: Path) -> str:
    """Which adapter; raises if it is none of the two."""
    adapter = smt_dist.read_adapter(folder)
    (value,) = adapter.deltas[Q].unique().tolist()
    assert adapter.config.groups[0].blocks == len(adapter.selection)
    return f"{len(adapter.selection)} of {value}"


def overwrite_and_kill(place: Path, kills: int, seed: int) -> dict[str, int]:
    """Count how often each adapter was found after ``kills`` kills."""
    folder = place / "adapter"
    models, draw = make_models(), random.Random(seed)
    smt_dist.save_adapter(next(iter(models.values())), folder)
    began = time.monotonic()
    smt_dist.save_adapter(next(iter(models.values())), folder)
    one_save = time.monotonic() - began
    found: Counter[str] = Counter()
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            for model in cycle(models.values()):
                smt_dist.save_adapter(model, folder)
        time.sleep(draw.uniform(0, 6 * one_save))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found[what_is_there(folder)] += 1
    assert set(found) == set(models), f"only {found}: nothing was overwritten"
    return dict(found)
