"""``SMTTrainer``: ``transformers.Trainer`` whose optimizer, checkpoints and resume know blocks.

Overrides methods of transformers 5.23 (``tests/test_checkpoint.py`` checks that each still exists).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from smt_dist.checkpoint.adapter import read_adapter, trained_deltas, verify_fingerprint
from smt_dist.checkpoint.training_state import (
    GLOBAL_BATCH,
    load_random_state,
    load_schedule,
    load_states,
    ranks_saved,
    restore_schedule,
)
from smt_dist.distributed import agree, assert_same_on_all_ranks, get_world_size
from smt_dist.engines import make_engine
from smt_dist.engines.base import BlockState, Engine, unwrapped
from smt_dist.engines.elementwise import state_names
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer, release_gradients
from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import rearrange
from smt_dist.sparse.surgery import frozen_layers, group_multipliers, multiplier_of, sparse_layers, touched_selection
from smt_dist.sparse.targets import may_be_idle
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.guards import GuardedTrainer
from smt_dist.training.reselect import PhaseEnd, train_in_phases
from smt_dist.training.saving import SavingTrainer

logger = logging.getLogger(__name__)

# Adam keeps an fp32 master and two fp32 moments of each trained element.
STATE_BYTES = 12


class SMTTrainer(GuardedTrainer, SavingTrainer):
    """Trains the blocks of a model.

    Args:
        model: after :func:`smt_dist.apply_selection`.
        args: with the engine and the DeepSpeed config.
        deltas: fp32 masters to start from, for engines whose parameters are rounded (an adapter to continue).
        **kwargs: as for ``transformers.Trainer``.

    Raises:
        SMTError: the model has no blocks, or a DeepSpeed ``optimizer`` section would drop learning-rate multipliers.
    """

    def __init__(
        self,
        model: nn.Module,
        args: SMTTrainingArguments,
        deltas: Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if not sparse_layers(model):
            raise SMTError("SMTTrainer: the model has no blocks; call smt_dist.apply_selection first")
        _refuse_dropped_multipliers(model, args)
        assert_same_on_all_ranks(model.smt_selection.to_json().encode(), "the block selection")
        self.engine: Engine = make_engine(args.engine_options)
        self._initial_deltas = deltas
        plan = model.smt_config.reselect if model.smt_config is not None else None
        self.phase_end = PhaseEnd(plan.every) if plan is not None else None
        with _saving_only_the_model(args):
            super().__init__(model=model, args=args, **kwargs)
        if args.engine != "deepspeed":
            # Trainer's own switch for a model that nobody may wrap, not even DDP: it would all-reduce the blocks
            # once more, and has nothing left to manage.
            self.is_distributed_loading_by_transformers = True
        if self.phase_end is not None:
            self.add_callback(self.phase_end)

    # -- phases ------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """As ``Trainer.train``; with ``reselect`` in the config, in phases between which blocks are exchanged."""
        options = {"trial": trial, "ignore_keys_for_eval": ignore_keys_for_eval}
        if self.phase_end is None:
            return super().train(resume_from_checkpoint, **options)
        return train_in_phases(self, self.model.smt_config.reselect, resume_from_checkpoint, options)

    def train_phase(self, resume_from_checkpoint: str | bool | None, options: dict[str, Any]) -> TrainOutput:
        """Train to the end, or to the next re-selection."""
        return super().train(resume_from_checkpoint, **options)

    def take_down(self) -> None:
        """Let go of engine and optimizer, so that the model is as before the training; :meth:`train` makes new ones."""
        self.accelerator.free_memory()  # destroys a DeepSpeed engine
        self.engine.forget(self.model)
        release_gradients(layer.delta for layer in sparse_layers(self.model).values())
        self.model_wrapped, self.optimizer, self.lr_scheduler = self.model, None, None
        self.callback_handler.optimizer = self.callback_handler.lr_scheduler = self.deepspeed = None
        self._initial_deltas = None

    # -- optimizer ---------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """``--optim`` over the blocks, one parameter group for each learning-rate multiplier.

        Weight decay pulls a block's delta to zero, that is, the model to its base.
        """
        if self.optimizer is None:
            args, layers = self.args, sparse_layers(self.model)
            blocks = [layer.delta for layer in layers.values()]
            groups = block_parameter_groups(model or self.model, args.learning_rate, args.weight_decay)
            release_gradients(blocks)  # of an earlier trainer's optimizer
            idle = any(may_be_idle(name) for name in layers)
            self.optimizer = self.engine.make_optimizer(groups, *self._optimizer_class_and_options(), idle)
            for block in blocks:
                # Trainer would all-reduce each gradient; the optimizer reduces them all at once.
                block._replicated_grad_hook_registered = True
        return self.optimizer

    def _optimizer_class_and_options(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        return self.args.custom_optimizer or self.get_optimizer_cls_and_kwargs(self.args, self.model)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        optimizer = unwrapped(self.optimizer)
        if isinstance(optimizer, ShardedBlockOptimizer):
            return optimizer.clip_grad_norm_(self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> float | None:
        optimizer = unwrapped(self.optimizer)
        if grad_norm is None and isinstance(optimizer, ShardedBlockOptimizer):
            grad_norm = optimizer.clip_grad_norm_(math.inf)  # measures only
        return super()._get_grad_norm(model, grad_norm)

    def describe_optimizer(self) -> str:
        """The bytes that the blocks' optimizer holds on this rank, by kind; after training."""
        kinds = self.engine.memory_bytes(self.optimizer)
        return "optimizer memory on this rank: " + ", ".join(f"{kind} {count:,} bytes" for kind, count in kinds.items())

    # -- checkpoints -------------------------------------------------------------------------------------------

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder, ranks = Path(checkpoint), get_world_size()
        agree(lambda: load_random_state(folder, self.args.process_index), "the random state")
        if (saved := ranks_saved(folder)) < ranks:
            logger.warning(
                "%s has random states of %d ranks; the other %d start with new ones", folder, saved, ranks - saved
            )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing yet: blocks and moments go in together, once the engine is there (_prepare_for_training)."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Nothing: see _prepare_for_training."""

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        # Without a checkpoint here, Trainer doesn't look for DeepSpeed's own checkpoint files, which we don't write.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.args.activation_checkpointing:
            # Trainer has just enabled it; see load_tokenizer_and_model for why its hook goes.
            self.model.disable_input_require_grads()
        if resume_from_checkpoint is not None:
            self._resume(Path(resume_from_checkpoint))
        elif self._initial_deltas is not None:
            self.engine.write_blocks(self.model, self.optimizer, self._initial_deltas)
        return prepared

    def _resume(self, folder: Path) -> None:
        def read() -> tuple[Iterator[BlockState], dict[str, int | float], int | None, list[float]]:
            adapter = read_adapter(folder)
            touched = touched_selection(self.model)
            if (adapter.selection.blocks, adapter.selection.block_size) != (touched.blocks, touched.block_size):
                raise SMTError(f"{folder}: its selection isn't the model's")
            verify_fingerprint(adapter, self.model.smt_base_fingerprint, str(folder))
            states, counters = load_states(folder, trained_deltas(adapter), self._state_names())
            schedule = load_schedule(folder, group_multipliers(self.model))
            saved_batch = schedule.pop(GLOBAL_BATCH, None)
            restore_schedule(self.lr_scheduler, schedule, folder)
            return states, counters, saved_batch, schedule["_last_lr"]

        states, counters, saved_batch, rates = agree(read, "reading the checkpoint")
        if saved_batch not in (None, self._global_batch_size()):
            logger.warning(
                "%s was saved with %d rows a step, now it is %d: data and schedule go on elsewhere, as the steps done "
                "count as steps of the new size; change --gradient_accumulation_steps with the number of ranks",
                folder,
                saved_batch,
                self._global_batch_size(),
            )
        self.engine.write_state(self.model, self.optimizer, states, counters)
        # The scheduler sets rates when it steps; the first step after a resume needs them before.
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _state_names(self) -> tuple[list[str], list[str]] | None:
        """The moments and counters that the optimizer will keep; None where the DeepSpeed JSON names it."""
        if "optimizer" in (self.args.filled_deepspeed_config() or {}):
            return None
        return state_names(*self._optimizer_class_and_options())

    def _load_best_model(self) -> None:
        if self.phase_end is not None and self.phase_end.ended:
            return
        folder = Path(self.state.best_model_checkpoint)
        logger.info("loading the best blocks from %s (score %s)", folder, self.state.best_metric)
        adapter = agree(lambda: read_adapter(folder), "reading the best checkpoint")
        # Blocks that have grown since are zero in it, ones that were frozen since go back to what they were.
        for name, layer in frozen_layers(self.model).items():
            own = self.model.smt_selection.model_copy(update={"blocks": {name: layer.blocks}})
            layer.freeze(rearrange(adapter.deltas.get(name), adapter.selection, own, name))
        active = self.model.smt_selection
        deltas = {name: rearrange(adapter.deltas.get(name), adapter.selection, active, name) for name in active.blocks}
        self.engine.write_blocks(self.model, self.optimizer, deltas)


@contextmanager
def _saving_only_the_model(args: SMTTrainingArguments) -> Iterator[None]:
    """Trainer refuses to be made for checkpoints of a model that was sharded as it was loaded; SMT's can be resumed."""
    before = args.save_only_model
    args.save_only_model = before or args.engine == "fsdp2"
    try:
        yield
    finally:
        args.save_only_model = before


def block_parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """The blocks by learning-rate multiplier, from the smallest on, and in the model's order."""
    by_multiplier: dict[float, list[nn.Parameter]] = {multiplier: [] for multiplier in group_multipliers(model)}
    for name, layer in sparse_layers(model).items():
        by_multiplier[multiplier_of(model, name)].append(layer.delta)
    return [
        {"params": parameters, "lr": learning_rate * multiplier, "weight_decay": weight_decay}
        for multiplier, parameters in by_multiplier.items()
    ]


def state_bytes_per_rank(model: nn.Module) -> int:
    """Bytes of AdamW's state a rank: fp32 master and two moments of this rank's share of the elements."""
    return STATE_BYTES * -(-model.smt_selection.parameters // get_world_size())


def _refuse_dropped_multipliers(model: nn.Module, args: SMTTrainingArguments) -> None:
    config = args.filled_deepspeed_config() or {}
    if "optimizer" in config and any(multiplier_of(model, name) != 1.0 for name in sparse_layers(model)):
        raise SMTError(
            "--deepspeed: an 'optimizer' section drops lr_multiplier; remove the section or set all multipliers to 1"
        )
