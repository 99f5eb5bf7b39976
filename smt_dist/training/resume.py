"""Restore a trainer from a checkpoint: blocks, moments, schedule, random states.

Also the best checkpoint's blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

from transformers import Trainer

from smt_dist.checkpoint.adapter import read_adapter, trained_deltas, verify_fingerprint
from smt_dist.checkpoint.atomic import VerifiedFolder
from smt_dist.checkpoint.training_state import (
    GLOBAL_BATCH,
    load_random_state,
    load_schedule,
    load_states,
    ranks_saved,
    restore_schedule,
)
from smt_dist.distributed import get_world_size, raise_on_any_rank
from smt_dist.engines.base import BlockState, Engine
from smt_dist.engines.elementwise import state_names
from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import rearrange
from smt_dist.sparse.surgery import ever_trained_selection, frozen_layers, group_multipliers
from smt_dist.training.saving import global_batch_size

logger = logging.getLogger(__name__)


def restore_training(trainer: Trainer, engine: Engine, checkpoint: VerifiedFolder) -> None:
    """Put a checkpoint's blocks, moments and schedule into a prepared trainer; collective.

    Raises:
        SMTError: on all ranks: the checkpoint isn't of this model, base, optimizer or schedule.
    """
    folder = checkpoint.folder

    def read() -> tuple[Iterator[BlockState], dict[str, int | float], int | None, list[float]]:
        adapter = read_adapter(checkpoint)
        ever_trained = ever_trained_selection(trainer.model)
        if (adapter.selection.blocks, adapter.selection.block_size) != (ever_trained.blocks, ever_trained.block_size):
            raise SMTError(f"{folder}: its selection isn't the model's")
        verify_fingerprint(adapter, trainer.model.smt.base_fingerprint, str(folder))
        states, counters = load_states(folder, trained_deltas(adapter), _state_names(trainer))
        schedule = load_schedule(folder, group_multipliers(trainer.model))
        saved_batch = schedule.pop(GLOBAL_BATCH, None)
        restore_schedule(trainer.lr_scheduler, schedule, folder)
        return states, counters, saved_batch, schedule["_last_lr"]

    states, counters, saved_batch, rates = raise_on_any_rank(read, "reading the checkpoint")
    if saved_batch not in (None, global_batch_size(trainer.args)):
        logger.warning(
            "%s was saved with %d rows a step, now it is %d: data and schedule go on elsewhere, as the steps done "
            "count as steps of the new size; change --gradient_accumulation_steps with the number of ranks",
            folder,
            saved_batch,
            global_batch_size(trainer.args),
        )
    engine.write_state(trainer.model, trainer.optimizer, states, counters)
    # The scheduler sets rates when it steps; the first step after a resume needs them before.
    for group, rate in zip(trainer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _state_names(trainer: Trainer) -> tuple[list[str], list[str]] | None:
    """Name the moments and counters that the optimizer keeps; None where a JSON names it."""
    if "optimizer" in (trainer.args.filled_deepspeed_config() or {}):
        return None
    return state_names(*trainer.optimizer_class_and_options())


def restore_random_state(folder: Path, rank: int) -> None:
    """Put this rank's random states back, where there are any; collective.

    Raises:
        SMTError: on all ranks: a file is malformed.
    """
    raise_on_any_rank(lambda: load_random_state(folder, rank), "the random state")
    if (saved := ranks_saved(folder)) < (ranks := get_world_size()):
        logger.warning(
            "%s has random states of %d ranks; the other %d start with new ones", folder, saved, ranks - saved
        )


def restore_best_blocks(trainer: Trainer, engine: Engine) -> None:
    """Put the best checkpoint's blocks into the model; collective.

    Raises:
        SMTError: on all ranks: it is damaged.
    """
    folder, model = Path(trainer.state.best_model_checkpoint), trainer.model
    logger.info("loading the best blocks from %s (score %s)", folder, trainer.state.best_metric)
    adapter = raise_on_any_rank(lambda: read_adapter(folder), "reading the best checkpoint")
    # Blocks that have grown since are zero in it, ones that were frozen since go back to what they were.
    active = model.smt.selection
    for name, layer in frozen_layers(model).items():
        own = active.model_copy(update={"blocks": {name: layer.blocks}})
        layer.freeze(rearrange(adapter.deltas.get(name), adapter.selection, own, name))
    deltas = {name: rearrange(adapter.deltas.get(name), adapter.selection, active, name) for name in active.blocks}
    engine.write_blocks(model, trainer.optimizer, deltas)
