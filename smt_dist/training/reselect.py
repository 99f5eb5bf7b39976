"""Re-selection while training: training runs in phases, and between two of them blocks are exchanged.

A phase ends with a checkpoint, which is free of engine and world size. The engine is taken down, a probe scores all
blocks of the targets by the gradients of the model as it is, with its blocks, and the checkpoint is written anew with
the weakest trained blocks frozen and new ones, at zero and with zero moments, in their place. The next phase resumes
from it like any run. So every engine takes part alike, and what was killed anywhere goes on from the last checkpoint:
one that was saved before its exchange makes it then.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from smt_dist.checkpoint.adapter import (
    ACTIVE_FILE,
    ActiveBlocks,
    Adapter,
    delta_shape,
    model_card,
    read_adapter,
    trained_deltas,
    write_adapter,
)
from smt_dist.checkpoint.atomic import MANIFEST_FILE, saving
from smt_dist.checkpoint.rotation import checkpoint_folder, find_checkpoint
from smt_dist.checkpoint.training_state import load_states, save_moments
from smt_dist.config import ReselectConfig, SMTConfig
from smt_dist.data.batches import TrainingData, warmup_batches
from smt_dist.distributed import agree, assert_same_on_all_ranks, write_on_rank_zero
from smt_dist.engines.base import Moments
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import enter_phase
from smt_dist.files import parse_json_object, read_text
from smt_dist.selection.exchange import exchange
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.blocks import Block, BlockSelection, rearrange
from smt_dist.sparse.fingerprint import base_fingerprint
from smt_dist.sparse.surgery import attach_touched
from smt_dist.sparse.targets import base_modules, weight_shape

if TYPE_CHECKING:
    from smt_dist.training.arguments import SMTTrainingArguments
    from smt_dist.training.trainer import SMTTrainer

logger = logging.getLogger(__name__)

# Zero moments at a late step: with a beta2 above this, a new block's first steps are several times too long.
LARGE_BETA2 = 0.99


class PhaseEnd(TrainerCallback):
    """Ends a phase with a checkpoint every so many steps.

    Attributes:
        ended: whether the phase ended here, and not the training.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.ended = False

    def on_train_begin(self, _args: Any, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.ended = False

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.ended = True
            # What was added up since the last log would be lost.
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.ended:
            return
        if state.epoch is not None and state.epoch % 1:  # no epoch ended
            control.should_log = control.should_save = control.should_evaluate = False
        else:  # what is logged now belongs into the checkpoint too
            control.should_save |= control.should_log or control.should_evaluate


def check_arguments(trainer: SMTTrainer) -> None:
    """Raise SMTError for flags that would take a phase's checkpoint away."""
    args = trainer.args
    if args.save_only_model:
        raise SMTError("--save_only_model: re-selection (reselect) goes on from its checkpoints; leave it out")
    if args.save_strategy == "best":
        raise SMTError("--save_strategy best: re-selection (reselect) needs checkpoints of its own; use another")
    if (args.load_best_model_at_end or args.metric_for_best_model is not None) and args.save_total_limit == 1:
        # Trainer would delete all but the best at the end of a phase.
        raise SMTError("--save_total_limit 1 with a best checkpoint: re-selection (reselect) needs at least 2")
    if args.adam_beta2 > LARGE_BETA2 and args.custom_optimizer is None:
        logger.warning(
            "reselect with --adam_beta2 %g: new blocks start at zero moments while the step count goes on, so their "
            "first steps are up to %.1f times too long; 0.95 (the paper's) makes that %.2f",
            args.adam_beta2,
            first_steps_factor(args.adam_beta1, args.adam_beta2),
            first_steps_factor(args.adam_beta1, 0.95),
        )


def first_steps_factor(beta1: float, beta2: float) -> float:
    """How long Adam's longest step from zero moments is, late in training, for a constant gradient; 1 is right."""
    return max((1 - beta1**k) / math.sqrt(1 - beta2**k) for k in range(1, 1000))


def train_in_phases(trainer: SMTTrainer, plan: ReselectConfig, resume: str | bool | None, options: Any) -> TrainOutput:
    """Train with re-selection; as ``Trainer.train``, with its ``options``."""
    check_arguments(trainer)
    outputs: list[TrainOutput] = []
    folder = find_checkpoint(resume or None, trainer.args.output_dir)
    if folder is None and getattr(trainer.model, "smt_reselected_at", None):
        trainer.model.smt_reselected_at = 0  # of another run, whose adapter this one continues
    if folder is not None and agree(lambda: _is_due(trainer, plan, Path(folder)), "the checkpoint"):
        reselect(trainer, plan, Path(folder))
    while True:
        outputs.append(trainer.train_phase(folder, options))
        # A run that was asked to end at the end of a phase makes the exchange when it goes on.
        if not trainer.phase_end.ended or trainer.preempted:
            return _joined(outputs)
        folder = str(checkpoint_folder(trainer.args.output_dir, trainer.state.global_step))
        reselect(trainer, plan, Path(folder))
        if trainer.asked_to_end():
            return _joined(outputs)


def reselect(trainer: SMTTrainer, plan: ReselectConfig, folder: Path) -> None:
    """Exchange blocks of the model and of the checkpoint in ``folder``; collective. No engine is left afterwards."""
    enter_phase(f"re-selection in {folder.name}")
    trainer.take_down()
    model, args, engine = trainer.model, trainer.args, trainer.engine
    adapter = agree(lambda: read_adapter(folder), "reading the checkpoint")
    step = _step_of(folder)
    config: SMTConfig = model.smt_config
    _attach(model, adapter, config, args)  # the masters' values, whatever the engine left, or a new process didn't have
    data = TrainingData(trainer.train_dataset, None, trainer.data_collator)
    with engine.probing(model):
        batches = warmup_batches(data, args.batch_order, plan.steps, offset=step)
        scores = collect_scores(model, batches, probe_config(config, plan), progress=not args.disable_tqdm)
    active = exchange(scores, adapter.trained, mean_strengths(adapter), config, plan.fraction)
    assert_same_on_all_ranks(active.to_json().encode(), f"the blocks re-selected at step {step}")
    touched = join(model, adapter.selection, active)
    fingerprint = base_fingerprint(model, touched)
    new = Adapter(adapter.config, touched, {}, fingerprint, ActiveBlocks(step=step, selection=active))
    write_on_rank_zero(lambda: _rewrite(folder, model, adapter, new), str(folder), "re-selection")
    written = agree(lambda: read_adapter(folder), "reading the checkpoint")
    _attach(model, written, config, args)
    kept = sum(len(set(blocks) & set(active.blocks.get(m, ()))) for m, blocks in adapter.trained.blocks.items())
    grown = len(active) - kept
    logger.info("step %d: re-selected %d of %d blocks; %d touched so far", step, grown, len(active), len(touched))


def _attach(model: nn.Module, adapter: Adapter, config: SMTConfig, args: SMTTrainingArguments) -> None:
    attach_touched(
        model,
        adapter.selection,
        adapter.trained,
        adapter.deltas,
        config,
        args.base_dtype,
        args.device,
        adapter.base_fingerprint,
    )
    if adapter.active is not None:
        model.smt_reselected_at = adapter.active.step


def probe_config(config: SMTConfig, plan: ReselectConfig) -> SMTConfig:
    """The config of a probe."""
    return config.model_copy(
        update={
            "selection": config.selection.model_copy(update={"score": plan.score}),
            "warmup": config.warmup.model_copy(update={"steps": plan.steps, "mode": "probe"}),
        }
    )


def mean_strengths(adapter: Adapter) -> dict[str, dict[Block, float]]:
    """Module -> trained block -> mean \\|delta\\| of its fp32 master: how far it went from the base."""
    strengths = {}
    deltas = trained_deltas(adapter)
    for module, blocks in adapter.trained.blocks.items():
        means = deltas[module].double().abs().unflatten(0, (len(blocks), -1)).mean(dim=(1, 2)).tolist()
        strengths[module] = dict(zip(blocks, means, strict=True))
    return strengths


def join(model: nn.Module, first: BlockSelection, second: BlockSelection) -> BlockSelection:
    """All blocks of both selections, in the model's order."""
    modules = {name: module for name, module in base_modules(model) if name in first.blocks or name in second.blocks}
    groups = first.groups | second.groups
    return BlockSelection(
        block_size=first.block_size,
        blocks={name: sorted({*first.blocks.get(name, ()), *second.blocks.get(name, ())}) for name in modules},
        shapes={name: weight_shape(module) for name, module in modules.items()},
        groups={name: groups[name] for name in modules if name in groups},
    )


def _rewrite(folder: Path, model: nn.Module, old: Adapter, new: Adapter) -> None:
    """Write the checkpoint anew in its place, whole or not at all; on one rank."""
    with saving(folder) as beside:
        shutil.copytree(
            folder,
            beside,
            ignore=shutil.ignore_patterns(beside.name, MANIFEST_FILE, ACTIVE_FILE),
            dirs_exist_ok=True,
        )
        deltas = (
            (module, rearrange(old.deltas.get(module), old.selection, new.selection, module))
            for module in new.selection.blocks
        )
        write_adapter(beside, new, new.selection.blocks, deltas, model_card(model, new.config, new.selection, ""))
        _rewrite_moments(folder, beside, old, new.trained)


def _rewrite_moments(folder: Path, beside: Path, old: Adapter, active: BlockSelection) -> None:
    states, counters = load_states(folder, trained_deltas(old))
    found = {state.module: state.moments for state in states}
    names = sorted(next(iter(found.values()))) if found else []

    def tensors() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        for module in active.blocks:
            own = found.get(module, {})
            yield module, {name: rearrange(own.get(name), old.trained, active, module) for name in names}

    shapes = {module: delta_shape(active, module) for module in active.blocks}
    save_moments(beside, shapes, Moments(names, counters, tensors()))


def _step_of(folder: Path) -> int:
    path = folder / TRAINER_STATE_NAME
    return int(parse_json_object(read_text(path), str(path))["global_step"])


def _is_due(trainer: SMTTrainer, plan: ReselectConfig, folder: Path) -> bool:
    """Whether a checkpoint was saved at the end of a phase, and the run was killed before its exchange."""
    path = folder / TRAINER_STATE_NAME
    state = parse_json_object(read_text(path), str(path))
    step = int(state["global_step"])
    last = trainer.args.max_steps if trainer.args.max_steps > 0 else int(state["max_steps"])
    done = getattr(trainer.model, "smt_reselected_at", None)
    return 0 < step < last and step % plan.every == 0 and done != step


def _joined(outputs: list[TrainOutput]) -> TrainOutput:
    """One result of all phases: losses weighed by steps, rates by time."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    times = [output.metrics["train_runtime"] for output in outputs]
    steps = [round(o.metrics["train_steps_per_second"] * time) for o, time in zip(outputs, times, strict=True)]
    loss = sum(o.training_loss * count for o, count in zip(outputs, steps, strict=True)) / max(sum(steps), 1)
    metrics = dict(last.metrics)
    for key in metrics:
        if key.endswith("_per_second"):
            metrics[key] = sum(o.metrics[key] * time for o, time in zip(outputs, times, strict=True)) / sum(times)
    metrics |= {"train_runtime": sum(times), "train_loss": loss}
    return TrainOutput(last.global_step, loss, metrics)
