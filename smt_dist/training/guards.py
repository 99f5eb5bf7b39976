"""``GuardedTrainer``: ``transformers.Trainer`` with the guards of a long run on machines that fail.

Before each optimizer step the ranks exchange a few integers, once: whether one of them was asked to end
(:mod:`~smt_dist.fault_tolerance.preemption`), and whether what should be equal is
(:mod:`~smt_dist.fault_tolerance.drift`, :mod:`~smt_dist.fault_tolerance.data_order`).
:mod:`~smt_dist.fault_tolerance.non_finite` looks at the step's numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smt_dist.checkpoint.rotation import checkpoint_folder
from smt_dist.config import SMTConfig
from smt_dist.distributed import agree, assert_same_on_all_ranks
from smt_dist.engines.base import Engine, unwrapped
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import enter_phase
from smt_dist.fault_tolerance.data_order import HashedSampler, dataset_digest, watch_order
from smt_dist.fault_tolerance.drift import (
    block_sums,
    check_masters,
    gather_integers,
    mixed,
    odd_ones,
    refuse_different_blocks,
    refuse_different_sums,
)
from smt_dist.fault_tolerance.non_finite import BadNumbers, poisoned_if_bad
from smt_dist.fault_tolerance.preemption import Preempted
from smt_dist.fault_tolerance.supervision import honour_collective_timeout, preemption
from smt_dist.sparse.surgery import sparse_layers

logger = logging.getLogger(__name__)


class GuardedTrainer(Trainer):
    """See the module. A subclass sets :attr:`engine` before it calls ``__init__``.

    Attributes:
        preempted: the number of the signal that ended training before its last step; 0 otherwise.
    """

    engine: Engine

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.preempted = 0
        self._order: HashedSampler | None = None
        config = getattr(self.model, "smt_config", None) or SMTConfig()
        self.bad_numbers = BadNumbers(config.bad_numbers)
        self.add_callback(self.bad_numbers)
        self.add_callback(_Guards(self))

    # -- Trainer's methods ---------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        self._order = watch_order(loader)
        return loader

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, Any]:
        enter_phase("preparing to train")
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        honour_collective_timeout(self.model, self.args.ddp_timeout, self.optimizer)
        if self.is_deepspeed_enabled:
            engine = self.accelerator.deepspeed_engine_wrapped.engine
            self.accelerator.deepspeed_engine_wrapped = _GuardedDeepSpeed(engine, self.before_step)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps or self.preempted:
            # Trainer looks only after a step whether that was the last: a run that was ended between its last
            # checkpoint and its adapter would be trained one step too far when it is started again. And one that was
            # asked to end while it prepared to go on has nothing to do.
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        enter_phase(f"training, step {self.state.global_step + 1}: forward")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.bad_numbers.note_loss(loss)
        enter_phase(f"training, step {self.state.global_step + 1}: backward")
        loss = poisoned_if_bad(loss)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        # A step that is skipped doesn't count in the mean loss either; it is announced and counted apart.
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The next class's, after the checks; collective."""
        self.check_before_save()
        super().save_model(output_dir, _internal_call)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        limit = self.args.save_total_limit
        if self.preempted:  # with a limit of 1 Trainer would delete what was just saved, as it isn't the best
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(trial, num_train_samples, start_time)
        finally:
            self.args.save_total_limit = limit

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With --save_strategy best it decides alone whether the step is saved.
        is_new_best = super()._determine_best_metric(metrics, trial)
        return is_new_best or bool(self.preempted)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        enter_phase(f"evaluation after step {self.state.global_step}")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    # -- checks --------------------------------------------------------------------------------------------------

    def before_step(self) -> None:
        """Exchange what the ranks must agree on, just before the optimizer moves anything; collective.

        Raises:
            SMTError: on all ranks: they have drifted apart, or one rank's values aren't its masters'.
        """
        step = f"step {self.state.global_step + 1}"
        enter_phase(f"training, {step}: optimizer step")
        sums = block_sums(self.model)
        names = list(sparse_layers(self.model))
        damaged = self.engine.damaged_block(self.model, self.optimizer)
        signals = preemption()
        own = [
            signals.requested if signals is not None else 0,
            0 if damaged is None else 1 + names.index(damaged),
            self._order.digest if self._order is not None else 0,
            mixed(sums),
        ]
        requests, damages, orders, blocks = zip(*gather_integers(own), strict=True)
        for rank, index in enumerate(damages):
            if index:
                raise SMTError(
                    f"{step}: the block values of {names[index - 1]} on rank {rank} aren't those of their fp32 masters"
                )
        if len(set(blocks)) > 1:
            refuse_different_sums(self.model, sums, step)
        if len(set(orders)) > 1:
            raise SMTError(f"{step}: the ranks read the data in different orders: {odd_ones(orders)}")
        self.preempted = max(requests)

    def check_before_save(self) -> None:
        """Nothing damaged is written over something good; collective.

        Raises:
            SMTError: on all ranks: blocks differ between ranks or from their masters, or a number isn't finite.
        """
        enter_phase(f"saving step {self.state.global_step}")
        refuse_different_blocks(self.model, "not saved")
        masters = self.engine.read_blocks(self.model, self.optimizer)
        damaged = None if self.optimizer is None else self.engine.damaged_block(self.model, self.optimizer)
        report = check_masters(self.model, damaged, masters, _local_state(self.optimizer))
        agree(report, "checking what is to be saved")
        if self.lr_scheduler is not None:
            progress = f"{self.state.global_step} {self.lr_scheduler.state_dict().get('_last_lr')}"
            assert_same_on_all_ranks(progress.encode(), "the step count or the learning rate")

    def begin_checks(self) -> None:
        """What must be equal before the first step; collective. Raises SMTError or RuntimeError on all ranks."""
        assert_same_on_all_ranks(dataset_digest(self.train_dataset), "the training data")
        refuse_different_blocks(self.model, "before training")
        if (signals := preemption()) is not None:
            signals.defer()
            # After a first step there is a checkpoint to go on from: the run ends as one that was asked in a step.
            if self.asked_to_end() and self.state.global_step == 0:
                raise Preempted(self.preempted)

    def asked_to_end(self) -> bool:
        """Whether a rank got a signal, outside of a step; collective."""
        if (signals := preemption()) is not None:
            self.preempted = max(request for (request,) in gather_integers([signals.requested]))
        return self.preempted != 0

    def saved_when_preempted(self) -> str:
        """The checkpoint that a preempted run has left."""
        return str(checkpoint_folder(self.args.output_dir, self.state.global_step))


class _Guards(TrainerCallback):
    """Calls the trainer's checks at Trainer's events."""

    def __init__(self, trainer: GuardedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.trainer.preempted = 0
        self.trainer.begin_checks()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:  # whose step was in the backward
            self.trainer.before_step()

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            self.trainer.preempted = 0  # it is done: the rest takes no longer than a save
        if self.trainer.preempted:
            control.should_save, control.should_training_stop = True, True
            self._spare_evaluation(control)
        return control

    def on_epoch_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        if (
            self.trainer.preempted and (state.epoch or 0) % 1
        ):  # cut short: no occasion for what is done at an epoch's end
            control.should_save = control.should_evaluate = False
        elif self.trainer.preempted:
            self._spare_evaluation(control)
            control.should_save = control.should_evaluate  # with its score, which the next launch won't ask for
        return control

    def _spare_evaluation(self, control: TrainerControl) -> None:
        """There is no time for it, unless its score decides which checkpoint is the best."""
        if self.trainer.args.metric_for_best_model is None:
            control.should_evaluate = False


class _GuardedDeepSpeed(DeepSpeedEngineWrapper):
    """accelerate's wrapper, whose ``backward`` takes the step too, with a check between the two."""

    def __init__(self, engine: Any, before_step: Any) -> None:
        super().__init__(engine)
        self._before_step = before_step

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self._before_step()
            self.engine.step()


def _local_state(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's part of the optimizer's state: what ShardedBlockOptimizer or ZeRO wraps keeps it."""
    if optimizer is None:
        return
    outer = unwrapped(optimizer)
    inner = outer.inner if hasattr(outer, "inner") else getattr(outer, "optimizer", outer)
    for state in inner.state.values():
        for key, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point():
                yield key, value
