"""``SMTTrainer``: ``transformers.Trainer`` whose optimizer, checkpoints and resume know blocks.

Overrides methods of transformers 5.23 (``tests/test_checkpoint.py`` checks that each still exists).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from smt_dist.adapter import read_adapter, save_adapter, verify_fingerprint
from smt_dist.arguments import SMTTrainingArguments
from smt_dist.checkpoint import (
    load_random_state,
    load_schedule,
    load_states,
    save_moments,
    save_random_state,
    save_schedule,
)
from smt_dist.distributed import agree, assert_same_on_all_ranks, barrier, get_world_size
from smt_dist.engines import BlockState, Engine, make_engine
from smt_dist.errors import SMTError
from smt_dist.model import sparse_layers

logger = logging.getLogger(__name__)

# Adam keeps an fp32 master and two fp32 moments of each trained element.
STATE_BYTES = 12


class SMTTrainer(Trainer):
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
        deltas: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if not sparse_layers(model):
            raise SMTError("SMTTrainer: the model has no blocks; call smt_dist.apply_selection first")
        _refuse_dropped_multipliers(model, args)
        assert_same_on_all_ranks(model.smt_selection.to_json().encode(), "the block selection")
        self.engine: Engine = make_engine(args.engine, args.filled_deepspeed_config())
        self._initial_deltas = deltas
        super().__init__(model=model, args=args, **kwargs)

    # -- optimizer ---------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over the blocks, one parameter group for each learning-rate multiplier.

        Weight decay pulls a block's delta to zero, that is, the model to its base.
        """
        if self.optimizer is None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = block_parameter_groups(model or self.model, self.args.learning_rate, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # -- checkpoints -------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (and the tokenizer); never the base. Collective."""
        folder = Path(output_dir or self.args.output_dir)
        deltas = self.engine.read_blocks(self.model)
        if self.args.should_save:
            save_adapter(self.model, folder, deltas, card=self._card_lines())
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
        barrier()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        states, step = self.engine.read_state(self.model, self.optimizer)
        # Reading is collective, so every rank reads; only one keeps and writes.
        if self.args.should_save:
            save_moments(Path(output_dir), states, step)
            save_schedule(Path(output_dir), self.lr_scheduler.state_dict())
        else:
            for _ in states:
                continue
        barrier()

    def _save_rng_state(self, output_dir: str) -> None:
        save_random_state(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not load_random_state(Path(checkpoint), self.args.process_index):
            logger.warning("%s has no random state for this rank (saved by fewer ranks)", checkpoint)

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
            self.engine.write_blocks(self.model, self._initial_deltas)
        return prepared

    def _resume(self, folder: Path) -> None:
        def read() -> tuple[Iterator[BlockState], int, dict[str, Any]]:
            adapter = read_adapter(folder)
            if adapter.selection.to_json() != self.model.smt_selection.to_json():
                raise SMTError(f"{folder}: its selection isn't the model's")
            verify_fingerprint(adapter, self.model.smt_base_fingerprint, str(folder))
            states, step = load_states(folder, adapter.deltas)
            return states, step, load_schedule(folder)

        states, step, schedule = agree(read, "reading the checkpoint")
        self.engine.write_state(self.model, self.optimizer, states, step)
        self.lr_scheduler.load_state_dict(schedule)
        # The scheduler sets rates when it steps; the first step after a resume needs them before.
        for group, rate in zip(self.optimizer.param_groups, schedule["_last_lr"], strict=True):
            group["lr"] = rate

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint)
        logger.info("loading the best blocks from %s (score %s)", folder, self.state.best_metric)
        self.engine.write_blocks(self.model, agree(lambda: read_adapter(folder), "reading the best checkpoint").deltas)

    def _card_lines(self) -> str:
        return (
            f"\nTrained for {self.state.global_step} steps, learning rate {self.args.learning_rate:g}, base in "
            f"{self.args.dtype}.\n"
        )


def block_parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """The blocks by learning-rate multiplier, in the model's order."""
    by_multiplier: dict[float, list[nn.Parameter]] = {}
    for name, layer in sparse_layers(model).items():
        by_multiplier.setdefault(_multiplier(model, name), []).append(layer.delta)
    return [
        {"params": parameters, "lr": learning_rate * multiplier, "weight_decay": weight_decay}
        for multiplier, parameters in by_multiplier.items()
    ]


def state_bytes_per_rank(model: nn.Module, engine: str) -> int:
    """Bytes of optimizer state a rank: fp32 master and two moments; ddp replicates them, ZeRO shards them."""
    total = STATE_BYTES * model.smt_selection.parameters
    return total if engine == "ddp" else -(-total // get_world_size())


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint folder in ``output_dir``, if any."""
    folders = [
        folder
        for folder in Path(output_dir).glob("checkpoint-*")
        # Trainer's own file is the last to be written: without it the save was cut short.
        if folder.name.rpartition("-")[2].isdigit() and (folder / TRAINER_STATE_NAME).exists()
    ]
    return os.fspath(max(folders, key=lambda folder: int(folder.name.rpartition("-")[2]))) if folders else None


def _multiplier(model: nn.Module, module: str) -> float:
    group = model.smt_selection.groups.get(module)
    multipliers = {g.name: g.lr_multiplier for g in model.smt_config.groups} if model.smt_config else {}
    return multipliers.get(group, 1.0)


def _refuse_dropped_multipliers(model: nn.Module, args: SMTTrainingArguments) -> None:
    config = args.filled_deepspeed_config() or {}
    if "optimizer" in config and any(_multiplier(model, name) != 1.0 for name in sparse_layers(model)):
        raise SMTError(
            "--deepspeed: an 'optimizer' section drops lr_multiplier; remove the section or set all multipliers to 1"
        )
