"""Non-finite values and diverging replicas, on purpose, under one engine after the other."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from smt_dist.config import SMTConfig
from smt_dist.data.batches import TrainingData
from smt_dist.distributed import barrier, get_rank
from smt_dist.engines import make_engine
from smt_dist.errors import SMTError
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.surgery import sparse_layers
from smt_dist.training.guards import GuardCallback
from smt_dist.training.pipeline import attach_blocks, collect_and_select
from smt_dist.training.trainer import SMTTrainer
from workers.runs import engine_arguments, load_model, training_data
from workers.training import BLOCKS, fixed_data, logged, make_trainer, release

NON_FINITE_STEP = 2
STEPS = 4
OPTIONS = {"max_steps": STEPS, "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 1}
MODULE = next(iter(BLOCKS))  # rank 1 of 2 has the last block's rows, where ranks share the weight


class _At(TrainerCallback):
    """Does something at one event of one step."""

    def __init__(self, event: str, step: int, action: Any) -> None:
        self.step, self.action = step, action
        setattr(self, event, self._event)

    def _event(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if state.global_step == self.step:
            self.action()


class _States(TrainerCallback):
    """Masters, moments and counters after each step."""

    def __init__(self, trainer: SMTTrainer) -> None:
        self.trainer, self.found = trainer, []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        engine, model, optimizer = self.trainer.engine, self.trainer.model, self.trainer.optimizer
        moments = engine.read_moments(model, optimizer)
        tensors = {f"{name}:{key}": value for name, found in moments.tensors for key, value in found.items()}
        masters = dict(engine.read_blocks(model, optimizer))
        self.found.append({"tensors": masters | tensors, "counters": moments.counters})


def _trainer(args: Any, model: str, data: TrainingData, non_finite: dict[str, Any]) -> SMTTrainer:
    policy = SMTConfig.model_validate({"non_finite": non_finite}).non_finite
    trainer = make_trainer(model, args, data)
    trainer.non_finite.config = policy
    return trainer


def non_finite(folder: Path, model: str, engines: list[str]) -> dict[str, dict[str, Any]]:
    """Engine -> what came of a loss and of a gradient that aren't finite, under each policy."""
    return {
        engine: {
            f"{where}-{policy}": _non_finite(folder / engine / where / policy, model, engine, where, {"policy": policy})
            for where in ("loss", "gradient")
            for policy in ("skip", "stop")
        }
        | {"limit": _non_finite(folder / engine / "limit", model, engine, "every loss", {"policy": "skip", "limit": 2})}
        for engine in engines
    }


def _non_finite(folder: Path, model: str, engine: str, where: str, policy: dict[str, Any]) -> dict[str, Any]:
    with engine_arguments(engine, folder, accumulation=2, **OPTIONS) as args:
        trainer = _trainer(args, model, fixed_data(), policy)
        _spoil(trainer, where)
        states = _States(trainer)
        trainer.add_callback(states)
        said = _said(trainer)
        result = {
            "said": said,
            "states": states.found,
            "skipped": trainer.non_finite.skipped,
            "losses": logged(trainer),
            "schedule": trainer.lr_scheduler.last_epoch,
            "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        }
        release(trainer)
    return result


def _spoil(trainer: SMTTrainer, where: str) -> None:
    """Rank 1's second micro-batch of a step has no finite loss, or rank 0's gradient of one module isn't finite."""
    if where == "gradient":

        def too_large(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.inf if trainer.state.global_step == NON_FINITE_STEP - 1 else gradient

        if get_rank() == 0:
            sparse_layers(trainer.model)[MODULE].delta.register_hook(too_large)
        return
    count = [0]

    def spoil(module: torch.nn.Module, args: Any, outputs: Any) -> Any:  # noqa: ARG001
        count[0] += 1
        if get_rank() == 1 and (where == "every loss" or count[0] == 2 * NON_FINITE_STEP):
            outputs.loss = outputs.loss * torch.nan
        return outputs

    trainer.model.register_forward_hook(spoil)


def _said(trainer: SMTTrainer) -> str:
    try:
        trainer.train()
    except (SMTError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def replica_divergence(folder: Path, model: str, engines: list[str]) -> dict[str, dict[str, Any]]:
    """Engine -> what came of one wrong element on rank 1."""
    found = {}
    for engine in engines:
        for when in ("in training", "before saving", "unguarded"):
            if when != "unguarded" or engine == "ddp":
                found.setdefault(engine, {})[when] = _corrupt(folder / engine / when, model, engine, when)
    return found


def _corrupt(folder: Path, model: str, engine: str, when: str) -> dict[str, Any]:
    with engine_arguments(engine, folder, **OPTIONS) as args:
        trainer = make_trainer(model, args, fixed_data())

        def damage() -> None:
            layer = sparse_layers(trainer.model)[MODULE]
            with torch.no_grad():
                computing_elements(layer)[3] += 0.5

        event = "on_step_end" if when == "before saving" else "on_step_begin"
        if get_rank() == 1:
            trainer.add_callback(_At(event, 3 if event == "on_step_end" else 2, damage))
        unguarded = mock.patch.multiple(GuardCallback, before_step=lambda _: None, check_before_save=lambda _: None)
        with unguarded if when == "unguarded" else contextlib.nullcontext():
            said = _said(trainer)
        result = {
            "said": said,
            "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
            "masters": dict(trainer.engine.read_blocks(trainer.model, trainer.optimizer)),
        }
        barrier()
        release(trainer)
    return result


def computing_elements(layer: SparseLayer) -> torch.Tensor:
    """A row of the last block's values that compute on this rank, the last of two; a view."""
    if not layer.is_in_place:
        return (layer.delta.ds_tensor if hasattr(layer.delta, "ds_tensor") else layer.delta).view(-1)
    row, col = layer.blocks[-1]
    weight, first = layer.weight, row * layer.grid.block_rows
    if isinstance(weight, DTensor):
        weight, first = weight.to_local(), first - (layer.grid.rows - len(weight.to_local()))
    return weight.detach()[first, layer.grid.col_slice(col)]


def other_data(folder: Path, model: str) -> dict[str, str]:
    """What the ranks say when rank 1 has other rows, or reads them in another order."""
    said = {}
    with engine_arguments("ddp", folder / "rows", **OPTIONS) as args:
        data = fixed_data()
        if get_rank() == 1:
            data.train = data.train.select([*range(40), 41, 40, *range(42, 48)])
        said["rows"] = _said(make_trainer(model, args, data))
    with engine_arguments("ddp", folder / "order", **(OPTIONS | {"train_sampling_strategy": "random"})) as args:
        trainer = make_trainer(model, args, fixed_data())
        loader = trainer.get_train_dataloader()
        if get_rank() == 1:
            loader.get_sampler().initial_seed = 5
        with mock.patch.object(trainer, "get_train_dataloader", return_value=loader):
            said["order"] = _said(trainer)
    return said


def cost(folder: Path, model: str) -> dict[str, float]:
    """Seconds of a step, of the checks in each step, and of those before a save; medians on this rank."""
    options = {"max_steps": 12, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 4}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (64, 256), generator=generator).tolist()
    rows = datasets.Dataset.from_list(
        [{"input_ids": row, "labels": row, "attention_mask": [1] * len(row)} for row in ids]
    )
    with engine_arguments("ddp", folder, **options) as args:
        base = load_model(model, args)
        config = SMTConfig.model_validate({"block_size": 32, "groups": [{"fraction": 0.03}], "warmup": {"steps": 1}})
        data = training_data(rows)
        selection, _ = collect_and_select(base, data, config, args, make_engine(args.engine_options))
        attach_blocks(base, selection, config, args)
        trainer = SMTTrainer(base, args, train_dataset=rows, data_collator=data.collator)
        spent: dict[str, list[float]] = {"step": [], "before_step": [], "check_before_save": []}
        for name in ("before_step", "check_before_save"):
            setattr(trainer.guard, name, _timed(getattr(trainer.guard, name), spent[name]))
        began: list[float] = []
        trainer.add_callback(_Clock(began, spent["step"]))
        trainer.train()
        release(trainer)
    return {name: statistics.median(values) for name, values in spent.items()}


def _timed(function: Any, spent: list[float]) -> Any:
    def timed() -> None:
        began = time.perf_counter()
        function()
        spent.append(time.perf_counter() - began)

    return timed


class _Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self, began: list[float], spent: list[float]) -> None:
        self.began, self.spent = began, spent

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.spent.append(time.perf_counter() - self.began[-1])
