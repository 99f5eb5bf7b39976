"""Saves checkpoints in mid-epoch and goes straight on; resumes checkpoints that other engines and ranks saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import TrainerCallback

from smt_dist.distributed import barrier, get_world_size
from smt_dist.engines.base import BlockState
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.surgery import sparse_layers
from smt_dist.training.trainer import SMTTrainer
from workers.checkpoints import SAVED_AT, STEPS
from workers.runs import engine_arguments
from workers.training import engine_type, fixed_data, logged, make_trainer, release

# The checkpoint lies in the warm-up of the schedule, the end in its decay: both have to go on.
OPTIONS = {
    "max_steps": STEPS,
    "warmup_steps": 5,
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
}


class Run(NamedTuple):
    """How one run trains. The global batch is the same for all."""

    engine: str
    world_size: int
    accumulation: int = 1
    dtype: str = "float32"
    optim: str = "adamw_torch"

    def __str__(self) -> str:
        special = [self.dtype] * (self.dtype != "float32") + [self.optim.rpartition(".")[2]] * ("." in self.optim)
        accumulation = [f"acc{self.accumulation}"] * (self.accumulation > 1)
        return "-".join([self.engine, str(self.world_size), *accumulation, *special])

    def arguments(self, output: Path, **options: Any) -> Any:
        """SMTTrainingArguments, as a context."""
        assert get_world_size() == self.world_size
        own = {"dtype": self.dtype, "optim": self.optim}
        return engine_arguments(self.engine, output, self.accumulation, **(OPTIONS | own | options))


class _Watched:
    """An iterator that counts how many of the tensors that it handed out are alive at once.

    gloo's thread lets go of a reduced tensor a moment after the reduction: seconds of ``grace`` for it.
    """

    def __init__(self, items: Iterator[tuple[str, Any]], grace: float = 2.0) -> None:
        self.items = items
        self.grace = grace
        self.storages: list[StorageWeakRef] = []
        self.peak = 0

    def __iter__(self) -> _Watched:
        return self

    def __next__(self) -> tuple[str, Any]:
        # No generator: its frame would itself keep a tensor alive.
        name, value = next(self.items)
        handed = list(value.values()) if isinstance(value, dict) else [value]
        self.storages += [StorageWeakRef(tensor.untyped_storage()) for tensor in handed]
        deadline = time.monotonic() + self.grace
        while self._alive() > len(handed) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.peak = max(self.peak, self._alive())
        return name, value

    def _alive(self) -> int:
        return sum(not storage.expired() for storage in self.storages)


class _AtLoad(TrainerCallback):
    """Reads the state back when it is in the engine and no step has been made; then zeroes moments that it loses."""

    def __init__(self, trainer: SMTTrainer, loses: str) -> None:
        self.trainer = trainer
        self.loses = loses
        self.found: dict[str, Any] = {}

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        found, layers = _state(self.trainer), sparse_layers(self.trainer.model)
        self.found = found | {
            "global_step": state.global_step,
            "computing": {name: _whole(layer) for name, layer in layers.items()},
            "expected": {name: layer.expected_values(found["masters"][name]) for name, layer in layers.items()},
            "learning_rates": [group["lr"] for group in self.trainer.optimizer.param_groups],
            "schedule": self.trainer.lr_scheduler.state_dict(),
        }
        if self.loses == "moments":
            engine, model, optimizer = self.trainer.engine, self.trainer.model, self.trainer.optimizer
            moments = engine.read_moments(model, optimizer)
            states = (
                BlockState(name, self.found["masters"][name], {key: value * 0 for key, value in found.items()})
                for name, found in moments.tensors
            )
            engine.write_state(model, optimizer, states, moments.counters)


def train(
    folder: Path, model: str, saved: str, saves: list[list[Any]], resumes: list[list[Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The findings of runs that save, then of runs that resume.

    Args:
        folder: of what resumed runs write.
        model: a folder.
        saved: where each saving run leaves a checkpoint of step :data:`SAVED_AT`; see :func:`checkpoint_of`.
        saves: runs that train to the end.
        resumes: each the saving run, the resuming one, and what is lost: ``data`` position, ``moments`` or nothing.
    """
    straight = [_save(Path(saved), model, Run(*run)) for run in saves]
    resumed = [
        _resume(folder / str(index), model, Run(*run), checkpoint_of(saved, Run(*source)), loses)
        for index, (source, run, loses) in enumerate(resumes)
    ]
    return straight, resumed


def checkpoint_of(saved: str | Path, run: Run) -> Path:
    """The checkpoint that a run leaves."""
    return Path(saved) / str(run) / f"checkpoint-{SAVED_AT}"


def _save(saved: Path, model: str, run: Run) -> dict[str, Any]:
    folder = saved / str(run)
    with run.arguments(folder, save_strategy="steps", save_steps=SAVED_AT, save_total_limit=None) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train()
        result = _findings(trainer) | {"alive": _tensors_alive(trainer, folder / "watched")}
        release(trainer)
    barrier()
    return result


def _resume(folder: Path, model: str, run: Run, checkpoint: Path, loses: str) -> dict[str, Any]:
    with run.arguments(folder, ignore_data_skip=loses == "data") as args:
        trainer = make_trainer(model, args, fixed_data())
        at_load = _AtLoad(trainer, loses)
        trainer.add_callback(at_load)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        result = _findings(trainer) | {"at_load": at_load.found}
        release(trainer)
    barrier()
    return result


def _findings(trainer: SMTTrainer) -> dict[str, Any]:
    return {
        "world_size": get_world_size(),
        "engine": engine_type(trainer),
        "accumulation": trainer.args.gradient_accumulation_steps,
        "losses": logged(trainer),
        "gradient_norms": [float(norm) for norm in logged(trainer, "grad_norm")],
        "learning_rates": logged(trainer, "learning_rate"),
        "end": _state(trainer),
    }


def _state(trainer: SMTTrainer) -> dict[str, Any]:
    """Masters, moments and counters, under the names that they have on disk."""
    moments = trainer.engine.read_moments(trainer.model, trainer.optimizer)
    return {
        "masters": dict(trainer.engine.read_blocks(trainer.model, trainer.optimizer)),
        "moments": {f"{name}:{key}": value for name, found in moments.tensors for key, value in found.items()},
        "counters": moments.counters,
    }


def _whole(layer: SparseLayer) -> torch.Tensor:
    """What computes, of blocks that may be partitioned."""
    if not hasattr(layer.delta, "ds_id"):
        return layer.computing_values().clone()
    with deepspeed.zero.GatheredParameters([layer.delta]):
        return layer.delta.detach().clone()


def _tensors_alive(trainer: SMTTrainer, folder: Path) -> dict[str, int]:
    """The most tensors that the engine read and that were alive at once, while a checkpoint is written."""
    engine, model, optimizer = trainer.engine, trainer.model, trainer.optimizer
    read_blocks, readings = engine.read_blocks, []

    def watched(*_: Any) -> _Watched:
        readings.append(_Watched(read_blocks(model, optimizer)))
        return readings[-1]

    read = engine.read_moments(model, optimizer)
    moments = _Watched(read.tensors)
    folder.mkdir(parents=True, exist_ok=True)
    engine.read_blocks = watched
    engine.read_moments = lambda *_: read._replace(tensors=moments)
    try:
        trainer.save_model(str(folder))
        trainer.writer._write_optimizer(folder)
    finally:
        del engine.read_blocks, engine.read_moments
    hoarded = _Watched(engine.read_blocks(model, optimizer), grace=0)
    assert list(hoarded)
    masters = max(reading.peak for reading in readings)
    return {"masters": masters, "moments": moments.peak, "hoarded": hoarded.peak}
