"""Look at blocks inside their weights under an engine: what computes, what is switched off, what is written."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from smt_dist.distributed import barrier, get_rank, get_world_size
from smt_dist.engines import in_place
from smt_dist.engines.base import unwrapped
from smt_dist.errors import SMTError
from smt_dist.sparse.block_rows import BlockRows
from smt_dist.sparse.blocks import merged_blocks, read_blocks, write_blocks
from smt_dist.sparse.surgery import blocks_disabled, sparse_layers
from smt_dist.training.trainer import SMTTrainer
from workers.runs import engine_arguments
from workers.training import BLOCKS, engine_type, fixed_data, make_trainer, release

STEPS = 3
MODULE = next(iter(BLOCKS))
OPTIONS = {"max_steps": STEPS, "train_sampling_strategy": "sequential"}


class _AtEnd(TrainerCallback):
    """Call a function at the end of a step, when the optimizer has moved everything."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.action()


def look(folder: Path, model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each run (``engine``, ``dtype`` and flags): what was seen after its second step, and later."""
    return [_look(folder / f"run{index}", model, **run) for index, run in enumerate(runs)]


def _look(folder: Path, model: str, engine: str, **options: Any) -> dict[str, Any]:
    with engine_arguments(engine, folder, **OPTIONS | options) as args:
        trainer = make_trainer(model, args, fixed_data())
        found: dict[str, Any] = {}
        trainer.add_callback(_AtEnd(2, lambda: found.update(_compare(trainer, model))))
        trainer.train()
        found |= {
            "world_size": get_world_size(),
            "engine": engine_type(trainer),
            "forms": sorted({type(layer).__name__ for layer in sparse_layers(trainer.model).values()}),
            "between": _step_between_forward_and_backward(trainer),
        }
        release(trainer)
        return found


def batch() -> dict[str, torch.Tensor]:
    """The same rows on every rank."""
    ids = torch.randint(1, 90, (2, 12), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def _compare(trainer: SMTTrainer, source: str) -> dict[str, Any]:
    """Compare what computes with the merged model and with the base, bit by bit."""
    model, dtype = trainer.model, trainer.args.base_dtype
    masters = dict(trainer.engine.read_blocks(model, trainer.optimizer))
    base = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    model.eval()
    seen = {"base": _logits(base)}
    with blocks_disabled(model):
        seen["off"] = _logits(model)
    seen["on"] = _logits(model)
    for name, layer in sparse_layers(model).items():
        weight = base.get_submodule(name).weight
        own = read_blocks(weight, layer.grid, layer.blocks)
        write_blocks(weight, layer.grid, layer.blocks, merged_blocks(own, masters[name]))
    seen["merged"] = _logits(base)
    model.train()
    return {
        "on is merged": torch.equal(seen["on"], seen["merged"]),
        "off is base": torch.equal(seen["off"], seen["base"]),
        "off from base": float((seen["off"] - seen["base"]).norm() / seen["base"].norm()),
        "moved": not torch.equal(seen["on"], seen["off"]),
        "reference": _reference_forward_between(trainer),
    }


def _logits(model: nn.Module) -> torch.Tensor:
    inputs = batch()
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.float()


@torch.enable_grad()
def _reference_forward_between(trainer: SMTTrainer) -> bool:
    """DPO's order: the policy's forward, the reference's, the backward; its gradients are those without a reference."""
    found = []
    for with_reference in (False, True):
        loss = trainer.model(**batch()).loss
        if with_reference:
            with torch.no_grad(), blocks_disabled(trainer.model):
                _logits(trainer.model)
        with _gradients(trainer.model) as gradients:
            loss.backward()
        found.append(gradients)
        unwrapped(trainer.optimizer).zero_grad()
    return all(torch.equal(found[0][name], found[1][name]) for name in BLOCKS)


@contextmanager
def _gradients(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Collect the blocks' gradients of the backwards inside, before the optimizer takes them."""
    gradients: dict[str, torch.Tensor] = {}
    hooks = [
        layer.delta.register_hook(lambda gradient, name=name: gradients.__setitem__(name, gradient.clone()))
        for name, layer in sparse_layers(model).items()
    ]
    yield gradients
    for hook in hooks:
        hook.remove()


def _step_between_forward_and_backward(trainer: SMTTrainer) -> str:
    """Say what comes of a backward whose forward was before a step."""
    model, optimizer = trainer.model, unwrapped(trainer.optimizer)
    model(**batch()).loss.backward()
    loss = model(**batch()).loss
    optimizer.step()
    try:
        loss.backward()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def lose_writes(folder: Path, model: str, engines: list[str]) -> dict[str, dict[str, Any]]:
    """Engine -> what is said after a write that was lost on the last rank, or interrupted on all."""
    return {
        engine: {"lost": _lose(folder / engine, model, engine), "cut": _interrupt(folder / f"{engine}2", model, engine)}
        for engine in engines
    }


def _lose(folder: Path, model: str, engine: str) -> str:
    with engine_arguments(engine, folder, **OPTIONS) as args:
        trainer = make_trainer(model, args, fixed_data())
        lost = sparse_layers(trainer.model)[MODULE].rows
        write = BlockRows.write

        def forget(self: BlockRows, *arguments: Any) -> None:
            if self is not lost:
                write(self, *arguments)

        patch = mock.patch.object(BlockRows, "write", forget)
        if get_rank() == get_world_size() - 1:
            trainer.add_callback(_Between(2, patch))
        try:
            trainer.train()
            said = "nothing"
        except SMTError as error:
            said = str(error)
        barrier()
        return said


def switch_off_alone(folder: Path, model: str) -> None:
    """Switch blocks off on rank 0, while the other ranks do something else."""
    with engine_arguments("ddp", folder / "out", **OPTIONS) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train()
        if get_rank() == 0:
            with mock.patch.object(in_place, "SECONDS", 2), blocks_disabled(trainer.model):
                pass
        time.sleep(60)


class _Between(TrainerCallback):
    """Hold a patch during one step."""

    def __init__(self, step: int, patch: Any) -> None:
        self.step, self.patch = step, patch

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self.step - 1:
            self.patch.start()

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.patch.stop()


def _interrupt(folder: Path, model: str, engine: str) -> dict[str, Any]:
    """Interrupt a step after it has written some of the weights, and go on."""
    with engine_arguments(engine, folder, **OPTIONS) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train()
        optimizer, write, written = unwrapped(trainer.optimizer), BlockRows.write, []

        def interrupted(self: BlockRows, *arguments: Any) -> None:
            if len(written) == 2:
                raise KeyboardInterrupt
            written.append(self)
            write(self, *arguments)

        for group in trainer.optimizer.param_groups:
            group["lr"] = args.learning_rate  # the schedule ended at zero
        trainer.model(**batch()).loss.backward()
        with mock.patch.object(BlockRows, "write", interrupted):
            try:
                optimizer.step()
            except KeyboardInterrupt:
                written.append(None)
        damaged = trainer.engine.damaged_block(trainer.model, trainer.optimizer)
        trainer.model.eval()
        with torch.no_grad():
            logits = _logits(trainer.model)
            optimizer.publish()
            expected = _logits(trainer.model)
        return {
            "interrupted": len(written) == 3,
            "damaged": damaged,
            "mended": torch.equal(logits, expected)
            and trainer.engine.damaged_block(trainer.model, trainer.optimizer) is None,
        }
