"""Drop and grow blocks of a model and its checkpoint between two rounds of training.

A round ends with a checkpoint, which is free of engine and world size. The engine is taken down, all blocks of the
targets are scored by the gradients of the model as it is, with its blocks, and the checkpoint is written anew with the
weakest trained blocks frozen (dropped) and new ones (grown), at zero and with zero moments, in their place. The next
round resumes from it like any run. So every engine takes part alike, and what was killed anywhere goes on from the last
checkpoint: one that was saved before its re-selection makes it then.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from smt_dist.checkpoint.adapter import (
    ACTIVE_FILE,
    ActiveBlocks,
    Adapter,
    attach_adapter,
    delta_shape,
    model_card,
    read_adapter,
    trained_deltas,
    write_adapter,
)
from smt_dist.checkpoint.atomic import MANIFEST_FILE, VerifiedFolder, saving
from smt_dist.checkpoint.rotation import find_checkpoint
from smt_dist.checkpoint.training_state import load_states, save_moments
from smt_dist.config import ReselectConfig, SMTConfig
from smt_dist.data.batches import TrainingData, warmup_batches
from smt_dist.distributed import assert_same_on_all_ranks, raise_on_any_rank, write_on_rank_zero
from smt_dist.engines.base import Moments
from smt_dist.engines.sharded_optimizer import release_gradients
from smt_dist.fault_tolerance.activity import begin_activity
from smt_dist.files import parse_json_object, read_text
from smt_dist.selection.drop_and_grow import drop_and_grow
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.blocks import Block, BlockSelection, rearrange
from smt_dist.sparse.fingerprint import base_fingerprint
from smt_dist.sparse.surgery import sparse_layers
from smt_dist.sparse.targets import base_modules, weight_shape
from smt_dist.training.trainer import SMTTrainer

logger = logging.getLogger(__name__)


def reselect(trainer: SMTTrainer, settings: ReselectConfig, checkpoint: VerifiedFolder) -> VerifiedFolder:
    """Drop and grow blocks of the model and of a checkpoint; collective.

    The engine is destroyed.

    Returns:
        The checkpoint as it was written anew, in its place.
    """
    folder = checkpoint.folder
    begin_activity(f"re-selection in {folder.name}")
    take_down(trainer)
    model, args, engine = trainer.model, trainer.args, trainer.engine
    adapter = raise_on_any_rank(lambda: read_adapter(checkpoint), "reading the checkpoint")
    step = _step_of(folder)
    config: SMTConfig = model.smt.config
    # The engine may have left rounded values, and a new process has none: take the masters'.
    attach_adapter(model, adapter._replace(config=config), args.base_dtype, args.device, args.auto_form)
    data = TrainingData(trainer.train_dataset, None, trainer.data_collator)
    with engine.scoring(model):
        batches = warmup_batches(data, args.batch_order, settings.steps, offset=step)
        scores = collect_scores(model, batches, scoring_config(config, settings), progress=not args.disable_tqdm)
    active = drop_and_grow(scores, adapter.trained, delta_magnitudes(adapter), config, settings.fraction)
    assert_same_on_all_ranks(active.to_json().encode(), f"the blocks re-selected at step {step}")
    ever_trained = join(model, adapter.selection, active)
    fingerprint = base_fingerprint(model, ever_trained)
    new = Adapter(adapter.config, ever_trained, {}, fingerprint, ActiveBlocks(step=step, selection=active))
    write_on_rank_zero(lambda: _rewrite(folder, model, adapter, new), str(folder), "re-selection")
    rewritten = find_checkpoint(str(folder), args.output_dir)
    written = raise_on_any_rank(lambda: read_adapter(rewritten), "reading the checkpoint")
    attach_adapter(model, written._replace(config=config), args.base_dtype, args.device, args.auto_form)
    kept = sum(len(set(blocks) & set(active.blocks.get(m, ()))) for m, blocks in adapter.trained.blocks.items())
    grown = len(active) - kept
    logger.info("step %d: re-selected %d of %d blocks; %d ever trained", step, grown, len(active), len(ever_trained))
    return rewritten


def take_down(trainer: SMTTrainer) -> None:
    """Release engine and optimizer; ``train`` makes new ones."""
    trainer.accelerator.free_memory()  # destroys a DeepSpeed engine
    trainer.engine.forget(trainer.model)
    release_gradients(layer.delta for layer in sparse_layers(trainer.model).values())
    trainer.model_wrapped, trainer.optimizer, trainer.lr_scheduler = trainer.model, None, None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = trainer.deepspeed = None
    trainer.initial_deltas = None


def scoring_config(config: SMTConfig, settings: ReselectConfig) -> SMTConfig:
    """Make the config by which the blocks of a re-selection are scored."""
    return config.model_copy(
        update={
            "selection": config.selection.model_copy(update={"score": settings.score}),
            "warmup": config.warmup.model_copy(update={"steps": settings.steps, "mode": "scoring"}),
        }
    )


def delta_magnitudes(adapter: Adapter) -> dict[str, dict[Block, float]]:
    """Compute module -> trained block -> mean \\|delta\\| of its fp32 master."""
    magnitudes = {}
    deltas = trained_deltas(adapter)
    for module, blocks in adapter.trained.blocks.items():
        means = deltas[module].double().abs().unflatten(0, (len(blocks), -1)).mean(dim=(1, 2)).tolist()
        magnitudes[module] = dict(zip(blocks, means, strict=True))
    return magnitudes


def join(model: nn.Module, first: BlockSelection, second: BlockSelection) -> BlockSelection:
    """Return all blocks of both selections, in the model's order."""
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
