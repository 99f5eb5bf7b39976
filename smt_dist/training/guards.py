"""Guard long runs on machines that fail.

Before each optimizer step the ranks all-gather a few integers, once: whether one of them was asked to end
(:mod:`~smt_dist.fault_tolerance.preemption`), and whether what should be equal is
(:mod:`~smt_dist.fault_tolerance.replica_divergence`, :mod:`~smt_dist.fault_tolerance.data_order`).
:mod:`~smt_dist.fault_tolerance.non_finite` looks at the step's numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils import DeepSpeedEngineWrapper
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from smt_dist.distributed import assert_same_on_all_ranks, raise_on_any_rank
from smt_dist.engines.base import Engine, unwrapped
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import begin_activity
from smt_dist.fault_tolerance.data_order import HashedSampler, dataset_digest, watch_order
from smt_dist.fault_tolerance.preemption import Preempted
from smt_dist.fault_tolerance.replica_divergence import (
    block_checksums,
    check_masters,
    combined_checksum,
    describe_odd_ranks,
    gather_integers,
    refuse_different_blocks,
    refuse_different_checksums,
)
from smt_dist.fault_tolerance.supervision import preemption
from smt_dist.sparse.surgery import sparse_layers


class GuardCallback(TrainerCallback):
    """Check what must be equal on all ranks.

    Before the first step, before each step and before each save.

    Args:
        trainer: whose model, optimizer and state are checked.
        engine: knows the blocks' masters.

    Attributes:
        preempted: the number of the signal that ended training before its last step; 0 otherwise.
    """

    def __init__(self, trainer: Trainer, engine: Engine) -> None:
        self.trainer = trainer
        self.engine = engine
        self.preempted = 0
        self._order: HashedSampler | None = None

    # -- checks ------------------------------------------------------------------------------------------------

    def begin_checks(self) -> None:
        """Compare what must be equal before the first step; collective.

        Raises:
            SMTError or RuntimeError: on all ranks: blocks or data differ.
            Preempted: a rank was asked to end before there is anything to save.
        """
        trainer = self.trainer
        assert_same_on_all_ranks(dataset_digest(trainer.train_dataset), "the training data")
        refuse_different_blocks(trainer.model, "before training")
        if (signals := preemption()) is not None:
            signals.defer()
            # After a first step there is a checkpoint to go on from: the run ends as one that was asked in a step.
            if self.asked_to_end() and trainer.state.global_step == 0:
                raise Preempted(self.preempted)

    def before_step(self) -> None:
        """Compare what must be equal on all ranks before the optimizer moves anything; collective.

        Raises:
            SMTError: on all ranks: replicas have diverged, or one rank's values aren't its masters'.
        """
        model, step = self.trainer.model, f"step {self.trainer.state.global_step + 1}"
        begin_activity(f"training, {step}: optimizer step")
        checksums = block_checksums(model)
        names = list(sparse_layers(model))
        damaged = self.engine.damaged_block(model, self.trainer.optimizer)
        signals = preemption()
        own = [
            signals.requested if signals is not None else 0,
            0 if damaged is None else 1 + names.index(damaged),
            self._order.digest if self._order is not None else 0,
            combined_checksum(checksums),
        ]
        requests, damages, orders, blocks = zip(*gather_integers(own), strict=True)
        for rank, index in enumerate(damages):
            if index:
                raise SMTError(
                    f"{step}: the block values of {names[index - 1]} on rank {rank} aren't those of their fp32 masters"
                )
        if len(set(blocks)) > 1:
            refuse_different_checksums(model, checksums, step)
        if len(set(orders)) > 1:
            raise SMTError(f"{step}: the ranks read the data in different orders: {describe_odd_ranks(orders)}")
        self.preempted = max(requests)

    def check_before_save(self) -> None:
        """Compare what would be saved, so that nothing damaged replaces something good; collective.

        Raises:
            SMTError: on all ranks: blocks differ between ranks or from their masters, or a number isn't finite.
        """
        model, optimizer, state = self.trainer.model, self.trainer.optimizer, self.trainer.state
        begin_activity(f"saving step {state.global_step}")
        refuse_different_blocks(model, "not saved")
        masters = self.engine.read_blocks(model, optimizer)
        damaged = None if optimizer is None else self.engine.damaged_block(model, optimizer)
        raise_problem = check_masters(model, damaged, masters, _local_state(optimizer))
        raise_on_any_rank(raise_problem, "checking what is to be saved")
        if self.trainer.lr_scheduler is not None:
            progress = f"{state.global_step} {self.trainer.lr_scheduler.state_dict().get('_last_lr')}"
            assert_same_on_all_ranks(progress.encode(), "the step count or the learning rate")

    def asked_to_end(self) -> bool:
        """Ask all ranks, outside of a step, whether one got a signal; collective."""
        if (signals := preemption()) is not None:
            self.preempted = max(request for (request,) in gather_integers([signals.requested]))
        return self.preempted != 0

    def guard_deepspeed(self) -> None:
        """Put :meth:`before_step` into accelerate's DeepSpeed wrapper, whose backward steps too."""
        wrapper = self.trainer.accelerator.deepspeed_engine_wrapped
        self.trainer.accelerator.deepspeed_engine_wrapped = _GuardedDeepSpeed(wrapper.engine, self.before_step)

    # -- Trainer's events --------------------------------------------------------------------------------------

    def on_train_begin(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
        self.preempted = 0
        self._order = watch_order(train_dataloader)
        self.begin_checks()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if not self.trainer.is_deepspeed_enabled:  # DeepSpeed has stepped in the backward already
            self.before_step()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        if state.global_step >= state.max_steps:
            self.preempted = 0  # training is done: what is left takes no longer than a save
        if self.preempted:
            control.should_save, control.should_training_stop = True, True
            _spare_evaluation(args, control)
        return control

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        if self.preempted and (state.epoch or 0) % 1:  # stopped within the epoch: nothing of an epoch's end is due
            control.should_save = control.should_evaluate = False
        elif self.preempted:
            _spare_evaluation(args, control)
            control.should_save = control.should_evaluate  # with its score, which the next launch won't compute
        return control


def _spare_evaluation(args: TrainingArguments, control: TrainerControl) -> None:
    """Skip the evaluation, unless its score decides which checkpoint is the best."""
    if args.metric_for_best_model is None:
        control.should_evaluate = False


class _GuardedDeepSpeed(DeepSpeedEngineWrapper):
    """Wrap accelerate's DeepSpeed wrapper: its ``backward`` also steps, after a check."""

    def __init__(self, engine: Any, before_step: Callable[[], None]) -> None:
        super().__init__(engine)
        self._before_step = before_step

    def backward(self, loss: torch.Tensor, sync_gradients: bool = True, **kwargs: Any) -> None:
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **kwargs)
        if sync_gradients:
            self._before_step()
            self.engine.step()


def _local_state(optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield this rank's part of the optimizer's state, which what is wrapped keeps."""
    if optimizer is None:
        return
    outer = unwrapped(optimizer)
    inner = outer.inner if hasattr(outer, "inner") else getattr(outer, "optimizer", outer)
    for state in inner.state.values():
        for key, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point():
                yield key, value
