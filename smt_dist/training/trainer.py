"""Define ``SMTTrainer``: ``transformers.Trainer`` for models with blocks.

Its overrides are methods of transformers 5.23 (``tests/test_checkpoint.py`` checks that each still exists); the work is
done by :class:`~smt_dist.training.guards.GuardCallback`, :class:`~smt_dist.training.saving.CheckpointWriter` and
:mod:`smt_dist.training.resume`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from smt_dist.checkpoint.atomic import VerifiedFolder
from smt_dist.checkpoint.rotation import checkpoint_folder, find_checkpoint
from smt_dist.config import SMTConfig
from smt_dist.data.dataset import trained_tokens
from smt_dist.distributed import assert_same_on_all_ranks, get_world_size
from smt_dist.engines import make_engine
from smt_dist.engines.base import Engine, unwrapped
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer, release_gradients
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import begin_activity
from smt_dist.fault_tolerance.non_finite import NonFiniteCallback, nan_gradients_if_non_finite
from smt_dist.fault_tolerance.supervision import honour_collective_timeout
from smt_dist.models.chunked_loss import whole_logits
from smt_dist.sparse.surgery import group_multipliers, sparse_layers
from smt_dist.sparse.targets import may_be_idle
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.guards import GuardCallback
from smt_dist.training.resume import restore_best_blocks, restore_random_state, restore_training
from smt_dist.training.saving import CheckpointWriter
from smt_dist.training.token_counts import LABELS, StepTokens, TokenMean, check_loader, mask_repeated_rows

# Adam keeps an fp32 master and two fp32 moments of each trained element.
STATE_BYTES = 12


class SMTTrainer(Trainer):
    """Train the blocks of a model.

    Args:
        model: after :func:`smt_dist.apply_selection`.
        args: with the engine and the DeepSpeed config.
        deltas: fp32 masters to start from, for engines whose parameters are rounded (an adapter to continue).
        engine: what ``args`` ask for, where the caller has it already.
        **kwargs: as for ``transformers.Trainer``.

    Attributes:
        engine: holds base, masters and state.
        guard: checks what must be equal on all ranks.
        writer: of adapters and checkpoints.
        non_finite: counts steps with NaN or infinity.
        evaluation_mean: the loss over all trained tokens of the last evaluation.
        step_tokens: of a model that doesn't divide by the global step's tokens itself.
        initial_deltas: written when training begins, unless it resumes.

    Raises:
        SMTError: the model has no blocks, its config asks for re-selection, or a DeepSpeed ``optimizer`` section would
            drop learning-rate multipliers.
    """

    reselects: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        args: SMTTrainingArguments,
        deltas: Mapping[str, torch.Tensor] | None = None,
        engine: Engine | None = None,
        **kwargs: Any,
    ) -> None:
        if not sparse_layers(model):
            raise SMTError("SMTTrainer: the model has no blocks; call smt_dist.apply_selection first")
        config = model.smt.config or SMTConfig()
        if config.reselect is not None and not self.reselects:
            raise SMTError(
                "SMTTrainer: the model's config has reselect; use smt_dist.training.rounds.trainer_class(model)"
            )
        _refuse_dropped_multipliers(model, args)
        for layer in sparse_layers(model).values():
            args.refuse_form("in_place" if layer.is_in_place else "additive")
        if not model.smt.is_compared:
            assert_same_on_all_ranks(model.smt.selection.to_json().encode(), "the block selection")
        self.engine = engine or make_engine(args.engine_options)
        self.initial_deltas = deltas
        # Trainer refuses to save the optimizer of a model that was sharded as it was loaded; SMT's checkpoints hold it.
        with _meanwhile(args, save_only_model=args.save_only_model or args.engine == "fsdp2"):
            super().__init__(model=model, args=args, **kwargs)
        if args.engine != "deepspeed":
            # Trainer's own switch for a model that nobody may wrap, not even DDP: it would all-reduce the blocks
            # once more, and has nothing left to manage.
            self.is_distributed_loading_by_transformers = True
        self.guard = GuardCallback(self, self.engine)
        self.writer = CheckpointWriter(self, self.engine)
        self.non_finite = NonFiniteCallback(config.non_finite)
        self.add_callback(self.non_finite)
        self.add_callback(self.guard)
        self.evaluation_mean = TokenMean()
        self.step_tokens: StepTokens | None = None
        if not self.model_accepts_loss_kwargs and self.compute_loss_func is None:
            # Trainer would weigh a micro-batch of one token like one of a thousand.
            self.step_tokens, self.loss_is_scaled_for_ga = StepTokens(), True

    @property
    def preempted(self) -> int:
        """Return the number of the signal that ended training before its last step; 0 for none."""
        return self.guard.preempted

    def saved_when_preempted(self) -> str:
        """Name the checkpoint that a preempted run has left."""
        return str(checkpoint_folder(self.args.output_dir, self.state.global_step))

    def describe_optimizer(self) -> str:
        """Describe the bytes that the optimizer holds on this rank, by kind; after training."""
        kinds = self.engine.memory_bytes(self.optimizer)
        return "optimizer memory on this rank: " + ", ".join(f"{kind} {count:,} bytes" for kind, count in kinds.items())

    def optimizer_class_and_options(self) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
        """Find what ``--optim`` means: class and keyword arguments."""
        return self.args.custom_optimizer or self.get_optimizer_cls_and_kwargs(self.args, self.model)

    # -- overrides: the run --------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | VerifiedFolder | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, as ``Trainer.train`` does, from a checkpoint that is whole (True: the newest such).

        Raises:
            SMTError: the checkpoint that is named is damaged, or there is none.
        """
        # Trainer would take the newest by its name, even if its save was cut short.
        checkpoint = find_checkpoint(resume_from_checkpoint or None, self.args.output_dir)
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: VerifiedFolder | None
    ) -> tuple[nn.Module, Any]:
        # Without a checkpoint here, Trainer doesn't look for its own or DeepSpeed's files, which aren't written.
        begin_activity("preparing to train")
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._finish_preparing(resume_from_checkpoint)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer looks only after a step whether it was the last: a run that was ended between its last checkpoint and
        # its adapter would be trained a step too far. One that was asked to end while it prepared has nothing to do.
        if self.state.global_step >= self.state.max_steps or self.preempted:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        # With --save_total_limit 1 Trainer would delete the checkpoint that the run continues from.
        with self.writer.keeping_checkpoints(bool(self.preempted)):
            return super()._finalize_training(trial, num_train_samples, start_time)

    # -- overrides: batches --------------------------------------------------------------------------------------

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        # Trainer would leave the evaluation's last rows out too.
        drops = self.args.dataloader_drop_last and kwargs.get("is_training", False)
        with _meanwhile(self.args, dataloader_drop_last=drops):
            return check_loader(super()._get_dataloader(*args, **kwargs))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Collect a step's micro-batches and count its trained tokens, each row once an epoch."""
        # Trainer would train once more on the rows that fill up the last batch, and divide by their tokens too.
        rows_once = (mask_repeated_rows(batch, self.accelerator.gradient_state) for batch in epoch_iterator)
        batches, items = super().get_batch_samples(rows_once, num_batches, device)
        if self.step_tokens is not None:
            self.step_tokens.begin(batches)
        return batches, items

    # -- overrides: a step ---------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make ``--optim`` over the blocks, one parameter group for each learning-rate multiplier.

        Weight decay pulls a block's delta to zero, that is, the model to its base.
        """
        # Trainer groups parameters by their names' decay, and its states aren't sharded.
        if self.optimizer is None:
            self.optimizer = self._make_optimizer(model or self.model)
        return self.optimizer

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        # Trainer would all-reduce each gradient once more, and broadcast parameters that only carry gradients; the
        # optimizer reduces them all at once, and the guard compares the values before the first step.
        pass

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Compute the loss as ``Trainer.compute_loss`` does; a non-finite one has NaN gradients."""
        # Else a rank whose loss is infinite could have finite gradients, and the step would be applied.
        if not model.training:
            return self._batch_mean(super().compute_loss, model, inputs, return_outputs)
        loss, outputs = self._watched_loss(super().compute_loss, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run one micro-batch, as ``Trainer.training_step`` does; a non-finite loss counts as 0."""
        # A step that is skipped would make the mean of all others NaN; it is announced and counted apart.
        loss = super().training_step(model, inputs, num_items_in_batch)
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        # The blocks' gradients aren't in .grad, where Trainer looks: it would clip nothing.
        optimizer = unwrapped(self.optimizer)
        is_ours = isinstance(optimizer, ShardedBlockOptimizer)
        return optimizer.clip_grad_norm_(self.args.max_grad_norm) if is_ours else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> float | None:
        # As above: Trainer would log a norm of 0 where nothing is clipped.
        optimizer = unwrapped(self.optimizer)
        if grad_norm is None and isinstance(optimizer, ShardedBlockOptimizer):
            grad_norm = optimizer.clip_grad_norm_(math.inf)  # measures only
        return super()._get_grad_norm(model, grad_norm)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate, as ``Trainer.evaluate`` does."""
        # Otherwise a rank that is lost here would be reported as lost in a training step.
        begin_activity(f"evaluation after step {self.state.global_step}")
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Run ``Trainer.evaluation_loop``; the loss is the mean over all trained tokens."""
        # Trainer's is a mean of batch means, which changes with the ranks and the batch size.
        self.evaluation_mean, loss = TokenMean(), f"{metric_key_prefix}_loss"
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if loss in output.metrics:
            output.metrics[loss] = self.evaluation_mean.value()
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Evaluate one batch, as ``Trainer.prediction_step`` does, and note its loss and tokens."""
        # As in training, rows that fill up the last batch count nothing. A chunked loss has no logits to hand over.
        inputs = mask_repeated_rows(inputs, self.accelerator.gradient_state)
        with whole_logits(model, wanted=not prediction_loss_only):
            result = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        self.evaluation_mean.add(result[0], self._tokens_of(inputs))
        return result

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # With --save_strategy best it decides alone whether a step is saved: a preempted run would leave nothing.
        is_new_best = super()._determine_best_metric(metrics, trial)
        return is_new_best or bool(self.preempted)

    # -- overrides: on disk --------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (and the tokenizer), whole or not at all; never the base. Collective."""
        # Trainer would write the base too, and under ZeRO-3 or FSDP2 empty tensors or a shard.
        self.guard.check_before_save()
        self.writer.write_adapter(Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        # Trainer's contains the base and pickles, and is incomplete after a full disk.
        self.guard.check_before_save()
        self.writer.write_checkpoint(Path(self._get_output_dir(trial=trial)))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Write metrics, as ``Trainer.save_metrics`` does, whole or not at all; collective."""
        # On a full disk rank 0 would end with a traceback, and the others would wait for it.
        self.writer.write_metrics(split, metrics, combined)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # Trainer would look for whole weights. Blocks and moments go in together, once the optimizer is there.
        pass

    def _load_rng_state(self, checkpoint: VerifiedFolder | None) -> None:
        # Trainer's are pickles.
        if checkpoint is not None:
            restore_random_state(Path(checkpoint), self.args.process_index)

    def _load_best_model(self) -> None:
        # Trainer would look for whole weights.
        restore_best_blocks(self, self.engine)

    # -- parts ---------------------------------------------------------------------------------------------------

    def _finish_preparing(self, checkpoint: VerifiedFolder | None) -> None:
        """Do what has to wait until engine and optimizer are there; collective."""
        honour_collective_timeout(self.model, self.args.ddp_timeout, self.optimizer)
        if self.is_deepspeed_enabled:
            self.guard.guard_deepspeed()
        if self.args.activation_checkpointing:
            # Trainer has just enabled it; see load_tokenizer_and_model for why its hook goes.
            self.model.disable_input_require_grads()
        if checkpoint is not None:
            restore_training(self, self.engine, checkpoint)
            if self.state.best_global_step:
                # By its step, beside this one: a path in a file from elsewhere isn't trusted.
                self.state.best_model_checkpoint = self.writer.best_checkpoint(checkpoint.folder.parent)
        elif self.initial_deltas is not None:
            self.engine.write_blocks(self.model, self.optimizer, self.initial_deltas)

    def _make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        args, layers = self.args, sparse_layers(self.model)
        blocks = [layer.delta for layer in layers.values()]
        groups = block_parameter_groups(model, args.learning_rate, args.weight_decay)
        release_gradients(blocks)  # of an earlier trainer's optimizer
        idle = any(may_be_idle(name) for name in layers)
        return self.engine.make_optimizer(groups, *self.optimizer_class_and_options(), idle, self.model)

    def _tokens_of(self, inputs: Any) -> torch.Tensor | None:
        """Count an evaluation batch's trained tokens; None without labels."""
        has_labels = any(inputs.get(name) is not None for name in LABELS)
        return trained_tokens(inputs, self._loss_shifts_labels) if has_labels else None

    def _batch_mean(self, compute: Any, model: nn.Module, inputs: Any, return_outputs: bool) -> Any:
        """Compute an evaluation batch's own mean loss; :meth:`prediction_step` weighs it."""
        if self.compute_loss_func is None:
            return compute(model, inputs, return_outputs, None)
        # A loss function of the user's divides by the tokens that it gets; Trainer would scale it to all ranks.
        tokens = self._tokens_of(inputs)
        with _meanwhile(self.args, average_tokens_across_devices=False):
            return compute(model, inputs, return_outputs, tokens)

    def _watched_loss(self, compute: Any, model: nn.Module, inputs: Any, items: Any) -> tuple[torch.Tensor, Any]:
        """Compute training loss and outputs, and note the loss.

        A non-finite loss gets NaN gradients, so that its step isn't applied.
        """
        step = f"training, step {self.state.global_step + 1}"
        begin_activity(f"{step}: forward")
        loss, outputs = compute(model, inputs, True, items)
        if self.step_tokens is not None:
            loss = self.step_tokens.share(loss, outputs, inputs, self.args.world_size)
        self.non_finite.note_loss(loss)
        begin_activity(f"{step}: backward")
        return nan_gradients_if_non_finite(loss), outputs


@contextmanager
def _meanwhile(args: SMTTrainingArguments, **values: Any) -> Iterator[None]:
    """Set arguments to other values inside the context."""
    before = {name: getattr(args, name) for name in values}
    vars(args).update(values)
    try:
        yield
    finally:
        vars(args).update(before)


def block_parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Group the blocks by learning-rate multiplier, smallest first, in the model's order."""
    by_multiplier: dict[float, list[nn.Parameter]] = {multiplier: [] for multiplier in group_multipliers(model)}
    for name, layer in sparse_layers(model).items():
        by_multiplier[model.smt.multiplier_of(name)].append(layer.delta)
    return [
        {"params": parameters, "lr": learning_rate * multiplier, "weight_decay": weight_decay}
        for multiplier, parameters in by_multiplier.items()
    ]


def state_bytes_per_rank(model: nn.Module) -> int:
    """Count the bytes of AdamW's state on a rank: fp32 master and two moments of its share."""
    return STATE_BYTES * -(-model.smt.selection.parameters // get_world_size())


def _refuse_dropped_multipliers(model: nn.Module, args: SMTTrainingArguments) -> None:
    config = args.filled_deepspeed_config() or {}
    if "optimizer" in config and any(model.smt.multiplier_of(name) != 1.0 for name in sparse_layers(model)):
        raise SMTError(
            "--deepspeed: an 'optimizer' section drops lr_multiplier; remove the section or set all multipliers to 1"
        )
